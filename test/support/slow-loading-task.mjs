// A task module that does not finish loading until a file exists: it awaits the file, or keeps the event loop busy.
import { existsSync, writeSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

const { LOADING, LOADED_WHEN } = process.env;
writeSync(1, `loading ${process.pid}\n`);
while (!existsSync(LOADED_WHEN)) if (LOADING === 'waits') await sleep(10);

export default function task() {
  writeSync(1, 'called\n');
}
