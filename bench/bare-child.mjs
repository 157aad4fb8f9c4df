// The floor of a task's process: loads the task, runs it, aborts its signal when told to stop, and exits.
import task from './task.mjs';

const stop = new AbortController();
process.on('message', async ({ start }) => {
  if (!start) return stop.abort(new Error('stop'));
  await task(start, { signal: stop.signal }).catch(() => undefined);
  process.exit(0);
});
process.on('disconnect', () => process.exit(1));
