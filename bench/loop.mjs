// Does the same work many times in this process, `concurrency` at a time, measured as the load generator measures.
import { summarise } from './statistics.mjs';

export async function runAll(ids, concurrency, work) {
  const milliseconds = new Float64Array(ids.length);
  let next = 0;
  const began = performance.now();
  const slot = async () => {
    while (next < ids.length) {
      const index = next++;
      const started = performance.now();
      await work(ids[index]);
      milliseconds[index] = performance.now() - started;
    }
  };
  await Promise.all(Array.from({ length: concurrency }, slot));
  return summarise(milliseconds, performance.now() - began);
}
