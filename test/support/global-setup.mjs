// One Postgres and one Redis for the whole run, on private ports. Each test file has a database of its own,
// cloned from a migrated template, and a queue prefix of its own.
import { rmSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Processes } from '../../scripts/processes.mjs';
import { reachable, startPostgres, startRedis } from '../../scripts/servers.mjs';
import { createTemplate } from './template.mjs';

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

export default async function setUp() {
  const place = reachable(join(root, '.local', 'test'));
  const processes = await Processes.open(place);
  for (const left of ['postgres', 'redis']) rmSync(join(place, left), { recursive: true, force: true });
  try {
    // The tests prove nothing about a power cut, so they need not wait for the disk.
    const postgres = await startPostgres(processes, place, {
      flags: ['-c', 'fsync=off', '-c', 'full_page_writes=off'],
    });
    const redis = await startRedis(processes, place);
    await createTemplate(postgres);
    Object.assign(process.env, { TEST_POSTGRES_URL: postgres, TEST_REDIS_URL: redis });
    globalThis.testProcesses = processes;
    for (const signal of ['SIGINT', 'SIGTERM']) {
      process.once(signal, () => {
        processes.kill();
        process.exit(1);
      });
    }
  } catch (error) {
    await processes.stop();
    throw error;
  }
}
