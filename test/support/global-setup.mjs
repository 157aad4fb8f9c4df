// One Postgres and one Redis for the whole run, on private ports. Each test file has a database of its own,
// cloned from a migrated template, and a queue prefix of its own.
import { spawnSync } from 'node:child_process';
import { rmSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import pg from 'pg';
import { Processes } from '../../scripts/processes.mjs';
import { reachable, startPostgres, startRedis } from '../../scripts/servers.mjs';

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
    const template = await createTemplate(postgres);
    Object.assign(process.env, { TEST_POSTGRES_URL: postgres, TEST_REDIS_URL: redis, TEST_TEMPLATE: template });
    globalThis.testProcesses = processes;
  } catch (error) {
    await processes.stop();
    throw error;
  }
}

async function createTemplate(url) {
  const name = 'scenario_jobs_template';
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  await client.query(`CREATE DATABASE ${name}`);
  await client.end();
  const database = new URL(url);
  database.pathname = `/${name}`;
  const migrate = spawnSync(process.execPath, [join(root, 'dist', 'cli', 'migrate.js')], {
    env: { ...process.env, DATABASE_URL: database.href },
    encoding: 'utf8',
  });
  if (migrate.status !== 0) throw new Error(`The migrations failed: ${migrate.stderr}`);
  return name;
}
