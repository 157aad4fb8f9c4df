// Keeps a Postgres for one test file: prints its URL, restarts it when told to, and ends it when standard input ends.
// Arguments are flags for Postgres.
import { chmodSync, mkdtempSync, rmSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { Processes } from '../../scripts/processes.mjs';
import { freePort, reachable, startPostgres } from '../../scripts/servers.mjs';
import { createTemplate } from './template.mjs';

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');
const place = mkdtempSync(join(reachable(join(root, '.local', 'own-postgres')), 'p-'));
chmodSync(place, 0o711); // Postgres runs as a user other than root.
const processes = await Processes.open(place);
const port = await freePort();
const flags = ['-c', 'fsync=off', '-c', 'full_page_writes=off', ...process.argv.slice(2)];
let whenEnded;

const start = () => startPostgres(processes, place, { port, flags, onExit: () => whenEnded?.() });

function end(signal) {
  const ended = new Promise((resolve) => (whenEnded = resolve));
  process.kill(processes.pidOf('postgres'), signal);
  return ended;
}

for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.stdin.destroy());
try {
  const url = await start();
  await createTemplate(url);
  console.log(url);
  // A signal may have come meanwhile. Of a stream that is destroyed already, readline would never see the end.
  const commands = process.stdin.destroyed ? [] : createInterface({ input: process.stdin });
  for await (const command of commands) {
    await end(command === 'immediate' ? 'SIGQUIT' : 'SIGINT');
    await start();
    console.log(url);
  }
} finally {
  await processes.stop();
  rmSync(place, { recursive: true, force: true });
}
