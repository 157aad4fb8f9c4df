import { spawnSync } from 'node:child_process';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import pg from 'pg';

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');
const TEMPLATE = 'scenario_jobs_template';

/** Creates the migrated database of which every test's own is a clone. */
export async function createTemplate(url) {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  await client.query(`CREATE DATABASE ${TEMPLATE}`);
  await client.end();
  const database = new URL(url);
  database.pathname = `/${TEMPLATE}`;
  const migrate = spawnSync(process.execPath, [join(root, 'dist', 'cli', 'migrate.js')], {
    env: { ...process.env, DATABASE_URL: database.href },
    encoding: 'utf8',
  });
  if (migrate.status !== 0) throw new Error(`The migrations failed: ${migrate.stderr}`);
}
