// The floor: the same effects as the service's, written by hand without a framework. One process, node:http, pg with
// prepared statements, and BullMQ's own script on a plain ioredis connection. It validates, logs and counts nothing,
// and handles no errors: nothing with the same effects can do less.
import { hash } from 'node:crypto';
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { Queue } from 'bullmq';
import { Redis } from 'ioredis';
import pg from 'pg';

const require = createRequire(import.meta.url);
const { removeJob } = require('../node_modules/bullmq/dist/cjs/scripts/removeJob-2.js');
const { newId } = require('../dist/infrastructure/ids.js');
const { DATABASE_URL, REDIS_URL, QUEUE_PREFIX, PORT } = process.env;

const pool = new pg.Pool({ connectionString: DATABASE_URL, max: 10 });
// Losing an idle connection is no reason to end.
pool.on('error', () => undefined);
const redis = new Redis(REDIS_URL);
redis.defineCommand('removeJob', { numberOfKeys: removeJob.keys, lua: removeJob.content });
const queue = new Queue('scenario-jobs', {
  connection: redis,
  prefix: QUEUE_PREFIX,
  defaultJobOptions: { removeOnComplete: true, removeOnFail: true, priority: 1 },
});
const base = `${QUEUE_PREFIX}:scenario-jobs:`;

const COLUMNS = 'id, status::text AS status, created_at, started_at, completed_at';
const OWNER = `SELECT k.id AS key_id, w.id AS workspace_id, w.slug, w.active
  FROM api_keys k JOIN workspaces w ON w.id = k.workspace_id
  WHERE k.hash = $1 AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())`;
// As in the service, only the primary key serves these conditions. If another index did, Postgres would now and then
// choose it because of outdated statistics, and take three times as long. That would be no floor.
const CANCEL = `UPDATE scenario_jobs
  SET status = 'cancelled', completed_at = GREATEST(now(), started_at), cancelled_by = $3, cancel_idempotency_key = NULL
  WHERE id = $1 AND (workspace_id = $2) IS TRUE AND status NOT IN ('completed', 'failed', 'cancelled')
  RETURNING ${COLUMNS}, run_id::text AS run_id, worker_id`;
const CREATE = `INSERT INTO scenario_jobs (id, workspace_id, user_email, prompt) VALUES ($1, $2, $3, $4)
  ON CONFLICT (workspace_id, request_id) DO NOTHING RETURNING ${COLUMNS}`;
const FIND = `SELECT j.id, j.status::text AS status, j.created_at, j.started_at, j.completed_at, s.id AS scenario_id
  FROM scenario_jobs j LEFT JOIN scenarios s ON s.job_id = j.id WHERE j.id = $1 AND (j.workspace_id = $2) IS TRUE`;

const one = async (name, text, values) => (await pool.query({ name, text, values })).rows[0];

async function cancel(id, { key_id, workspace_id }) {
  const job = await one('cancel', CANCEL, [id, workspace_id, key_id]);
  if (!job.run_id) await redis.removeJob(`${base}${id}`, `${base}repeat`, id, 1, base);
  else
    await redis.publish(
      `${QUEUE_PREFIX}:cancel:${job.worker_id}`,
      JSON.stringify({ jobId: job.id, runId: job.run_id }),
    );
  return job;
}

async function create(request, { workspace_id }) {
  let text = '';
  for await (const chunk of request.setEncoding('utf8')) text += chunk;
  const { user_email, prompt } = JSON.parse(text);
  const job = await one('create', CREATE, [newId(), workspace_id, user_email, prompt]);
  await queue.add('run', {}, { jobId: job.id });
  return job;
}

function show({ id, status, created_at, started_at, completed_at }) {
  const duration_seconds = started_at && completed_at ? (completed_at - started_at) / 1000 : null;
  return { id, status, scenario: null, error: null, created_at, started_at, completed_at, duration_seconds };
}

async function answer(request) {
  if (request.url === '/readyz') return {};
  const key = request.headers.authorization.slice('Bearer '.length);
  const owner = await one('owner', OWNER, [hash('sha256', key)]);
  if (!owner.active) throw new Error('the workspace is inactive');
  const id = request.url.slice(request.url.lastIndexOf('/') + 1);
  if (request.method === 'DELETE') return show(await cancel(id, owner));
  if (request.method === 'POST') return { ...show(await create(request, owner)), is_new: true };
  return show(await one('find', FIND, [id, owner.workspace_id]));
}

const server = createServer({ keepAliveTimeout: 72_000 }, async (request, response) => {
  const text = await answer(request).then(JSON.stringify);
  response
    .writeHead(request.method === 'POST' ? 201 : 200, {
      'content-type': 'application/json; charset=utf-8',
      'content-length': Buffer.byteLength(text),
    })
    .end(text);
});
server.listen(Number(PORT), '127.0.0.1');
