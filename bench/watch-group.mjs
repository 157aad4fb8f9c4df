// Watches a process group from outside until nothing in it lives, on a thread of its own, four times a millisecond.
import { parentPort, Worker } from 'node:worker_threads';

const EVERY_MS = 0.25;

/** In the thread: answers each process group's id with the time at which the group was gone. */
if (parentPort) {
  const cell = new Int32Array(new SharedArrayBuffer(4));
  parentPort.on('message', ({ pid, patienceMs }) => {
    const deadline = performance.now() + patienceMs;
    while (isAlive(pid) && performance.now() < deadline) Atomics.wait(cell, 0, 0, EVERY_MS);
    parentPort.postMessage(isAlive(pid) ? null : process.hrtime.bigint());
  });
}

function isAlive(pid) {
  try {
    process.kill(-pid, 0);
    return true;
  } catch {
    return false;
  }
}

/** Returns a function that resolves with the time (of `process.hrtime`) at which a process group was gone. */
export function openWatch() {
  const thread = new Worker(new URL(import.meta.url));
  const untilGone = async (pid, patienceMs = 30_000) => {
    thread.postMessage({ pid, patienceMs });
    const gone = await new Promise((resolve) => thread.once('message', resolve));
    if (gone === null) throw new Error(`process group ${pid} is still alive after ${patienceMs} ms`);
    return gone;
  };
  return { untilGone, close: () => thread.terminate() };
}
