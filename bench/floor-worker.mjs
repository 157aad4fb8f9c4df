// The floor of a worker that stops tasks, written by hand: it hears the message, asks Postgres whether the run is
// cancelled, and tells the bare child that runs it. It records nothing, checks nothing twice, and cannot cope with a
// lost message or a task that does not listen.
import { Redis } from 'ioredis';
import pg from 'pg';
import { serve } from './helper.mjs';
import { startBareChild } from './start-bare-child.mjs';

const { DATABASE_URL, REDIS_URL, CHANNEL } = process.env;
const IS_CANCELLED = `SELECT 1 FROM scenario_jobs WHERE id = $1 AND run_id = $2 AND status = 'cancelled'`;

const pool = new pg.Pool({ connectionString: DATABASE_URL, max: 1 });
const redis = new Redis(REDIS_URL);
const children = new Map();

redis.on('message', async (_, text) => {
  const { jobId, runId } = JSON.parse(text);
  const { rowCount } = await pool.query({ name: 'is-cancelled', text: IS_CANCELLED, values: [jobId, runId] });
  if (rowCount === 1) children.get(jobId).send({});
});

/** Starts the task of a job, and answers with its process id once its code runs. */
async function start({ jobId, prompt }) {
  const { child, printed } = startBareChild(prompt);
  children.set(jobId, child);
  child.once('exit', () => children.delete(jobId));
  await printed;
  return child.pid;
}

serve({ listen: () => redis.subscribe(CHANNEL), start });
