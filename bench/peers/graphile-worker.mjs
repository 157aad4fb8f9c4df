// graphile-worker's `completeJobs`, in process: its way to withdraw a job.
import { Logger, makeWorkerUtils } from 'graphile-worker';
import pg from 'pg';
import { serve } from '../helper.mjs';
import { runAll } from '../loop.mjs';

const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 10 });
const logger = new Logger(() => () => undefined);
let utils;

async function open() {
  pool.on('error', () => undefined);
  pool.on('connect', (client) => client.on('error', () => undefined));
  utils = await makeWorkerUtils({ pgPool: pool, logger });
  await utils.migrate();
}

async function cancel({ count, concurrency }) {
  const payload = { prompt: 'Discovery call with an IT director' };
  const jobs = await utils.addJobs(Array.from({ length: count }, () => ({ identifier: 'bench', payload })));
  await pool.query('ANALYZE');
  const completed = [];
  const measured = await runAll(
    jobs.map(({ id }) => id),
    concurrency,
    async (id) => completed.push(...(await utils.completeJobs([id]))),
  );
  if (completed.length !== count) throw new Error(`only ${completed.length} of ${count} jobs are completed`);
  return measured;
}

serve({ open, cancel });
