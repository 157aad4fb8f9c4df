// Starts the floor of a task's process.
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { root } from '../scripts/prepare.mjs';

/** Starts the child; `printed` resolves with the first thing that the task printed. */
export function startBareChild(prompt) {
  const stdio = ['ignore', 'pipe', 'inherit', 'ipc'];
  const child = fork(join(root, 'bench/bare-child.mjs'), [], { detached: true, stdio });
  child.send({ start: { prompt } });
  return { child, printed: once(child.stdout, 'data').then(String) };
}
