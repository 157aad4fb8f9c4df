// Simulates workers: each has a connection to Redis, subscribed to its own channel, and a connection to Postgres on
// which it asks every two seconds what the service's worker asks (`reportAlive` in job.repository.ts). Says how
// often they asked.
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

async function connect({ count, databaseUrl, redisUrl, prefix }) {
  for (let index = 0; index < count; index++) workers.push(await startWorker(index, { databaseUrl, redisUrl, prefix }));
  // Spread over the interval, as those of many machines are.
  for (const [index, worker] of workers.entries()) worker.polling = poll(worker, (POLL_MS * index) / count);
}

async function startWorker(index, { databaseUrl, redisUrl, prefix }) {
  const id = `simulated-${index}`;
  const redis = new Redis(redisUrl);
  await redis.subscribe(`${prefix}:cancel:${id}`);
  const postgres = new pg.Client({ connectionString: databaseUrl });
  await postgres.connect();
  return { id, redis, postgres };
}

async function poll(worker, delay) {
  await sleep(delay);
  while (!worker.stopped) {
    await worker.postgres.query(REPORT_ALIVE, [worker.id]);
    polls++;
    await sleep(POLL_MS);
  }
}

async function disconnect() {
  for (const worker of workers) worker.stopped = true;
  await Promise.all(workers.map(({ polling }) => polling));
  for (const { redis, postgres } of workers) {
    redis.disconnect();
    await postgres.end();
  }
  const asked = polls;
  workers = [];
  polls = 0;
  return asked;
}

serve({ connect, disconnect });
