// The task of the benchmark. Prints when its code begins to run, then waits for its signal, computes without
// yielding, or, for `[return]`, is done.
export default async function task({ prompt }, { signal }) {
  console.log(`began ${process.hrtime.bigint()} ${performance.now()}`);
  if (prompt.startsWith('[spin]')) for (;;);
  if (prompt.startsWith('[return]')) return { name: 'Discovery call' };
  // A timer keeps the process alive while it waits.
  const waiting = setInterval(() => undefined, 2 ** 30);
  await new Promise((resolve) => signal.addEventListener('abort', resolve));
  clearInterval(waiting);
  throw signal.reason;
}
