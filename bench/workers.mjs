// Simulates workers: each has a connection to Redis, subscribed to its own channel, and a connection to Postgres on
// which it asks every two seconds what the service's worker asks (`reportAlive` in worker.repository.ts). Reports how
// often they asked.
import { setMaxListeners } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { Redis } from 'ioredis';
import pg from 'pg';
import { serve } from './helper.mjs';

const POLL_MS = 2000;
const REPORT_ALIVE = `WITH alive AS (
    INSERT INTO workers (id) VALUES ($1) ON CONFLICT (id) DO UPDATE SET seen_at = now()
  )
  SELECT j.id AS "jobId", j.run_id::text AS "runId", j.status::text AS status,
         EXTRACT(EPOCH FROM clock_timestamp() - j.completed_at)::float8 AS "cancelledSeconds"
  FROM scenario_jobs j WHERE j.worker_id = $1
    AND (j.worker_id IS NOT NULL AND j.status IN ('processing', 'cancelled') AND j.stopped_at IS NULL)`;

let workers = [];
let polls = 0;
let stopping;

async function connect({ count, ...where }) {
  stopping = new AbortController();
  setMaxListeners(count, stopping.signal);
  workers = await Promise.all(Array.from({ length: count }, (_, index) => startWorker(index, where)));
  // Spread over the interval, like the polls of many machines.
  for (const [index, worker] of workers.entries()) worker.polling = poll(worker, (POLL_MS * index) / count);
}

async function startWorker(index, { databaseUrl, redisUrl, prefix }) {
  const id = `simulated-${index}`;
  const redis = new Redis(redisUrl);
  await redis.subscribe(`${prefix}:cancel:${id}`);
  const postgres = new pg.Client({ connectionString: databaseUrl });
  await postgres.connect();
  // The first query of a connection takes many times as long as the others, and is not what is measured.
  await postgres.query(REPORT_ALIVE, [id]);
  return { id, redis, postgres };
}

async function poll({ id, postgres }, delay) {
  await pause(delay);
  while (!stopping.signal.aborted) {
    await postgres.query(REPORT_ALIVE, [id]);
    polls++;
    await pause(POLL_MS);
  }
}

const pause = (ms) => sleep(ms, undefined, { signal: stopping.signal }).catch(() => undefined);

async function disconnect() {
  stopping.abort();
  await Promise.all(
    workers.map(async ({ polling, redis, postgres }) => {
      await polling;
      redis.disconnect();
      await postgres.end();
    }),
  );
  const asked = polls;
  polls = 0;
  return asked;
}

serve({ connect, disconnect });
