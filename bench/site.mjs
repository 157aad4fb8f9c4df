// A site where jobs are made and cancelled: a database with a workspace and a key, a queue, and an api.
import { createRequire } from 'node:module';
import { randomUUID } from 'node:crypto';
import { JOBS } from './jobs.mjs';

const require = createRequire(import.meta.url);
/** Options of a queue entry as the service adds it; see src/modules/scenario-jobs/job-queue.ts. */
const ENTRY = { removeOnComplete: true, removeOnFail: true, priority: 1 };
const CHUNK = 5000;

export async function openSite(stage, name, { nodeFlags, environment, withApi = true } = {}) {
  const { default: pg } = await import('pg');
  const { Queue } = await import('bullmq');
  const { Redis } = await import('ioredis');
  const { newApiKey, hashApiKey } = require('../dist/auth/api-key.js');
  const databaseUrl = await stage.createDatabase(name);
  const pool = new pg.Pool({ connectionString: databaseUrl, max: 2 });
  pool.on('error', () => undefined);
  const workspaceId = 'w00000000001';
  const key = newApiKey();
  await pool.query(`INSERT INTO workspaces (id, slug) VALUES ($1, 'bench') ON CONFLICT DO NOTHING`, [workspaceId]);
  await pool.query(`INSERT INTO api_keys (id, workspace_id, name, hash) VALUES ('k00000000001', $1, 'bench', $2)`, [
    workspaceId,
    hashApiKey(key),
  ]);
  const prefix = `{bench-${name}}`;
  const redis = new Redis(stage.redisUrl, { maxRetriesPerRequest: null });
  redis.on('error', () => undefined);
  const queue = new Queue('scenario-jobs', { connection: redis, prefix, defaultJobOptions: ENTRY });
  queue.on('error', () => undefined);
  const site = { name, stage, databaseUrl, pool, workspaceId, key, prefix, redis, queue };
  site.environment = { DATABASE_URL: databaseUrl, QUEUE_PREFIX: prefix, ...environment };
  if (withApi) site.api = await stage.startService(`api-${name}`, 'main.api.js', site.environment, nodeFlags);
  site.close = async () => {
    await site.api?.stop();
    await queue.close();
    redis.disconnect();
    await pool.end();
  };
  return site;
}

export function newIds(count) {
  const { newId } = require('../dist/infrastructure/ids.js');
  return Array.from({ length: count }, newId);
}

/** Makes queued jobs: rows, and entries of the queue. */
export async function makeQueued(site, count) {
  const ids = newIds(count);
  await insertRows(site, ids);
  await addEntries(site.queue, ids);
  return ids;
}

/** Makes jobs that the workers with these ids seem to process, in turn; nobody really runs them. */
export async function makeProcessing(site, count, ...workerIds) {
  const ids = newIds(count);
  await insertRows(site, ids);
  await site.pool.query(
    `UPDATE scenario_jobs AS j SET status = 'processing', started_at = now(), attempt = 1, worker_id = run.worker_id,
       run_id = gen_random_uuid()
     FROM unnest($1::text[], $2::text[]) AS run (id, worker_id) WHERE j.id = run.id`,
    [ids, ids.map((_, index) => workerIds[index % workerIds.length])],
  );
  return ids;
}

export async function insertRows({ pool, workspaceId }, ids) {
  await pool.query(
    `INSERT INTO scenario_jobs (id, workspace_id, user_email, prompt)
     SELECT id, $2, 'ada@example.com', 'Discovery call with an IT director' FROM unnest($1::text[]) AS id`,
    [ids, workspaceId],
  );
}

/** Adds entries to a BullMQ queue, a few thousand at a time. */
export async function addEntries(queue, ids, opts = ENTRY) {
  for (let start = 0; start < ids.length; start += CHUNK) {
    const chunk = ids.slice(start, start + CHUNK);
    await queue.addBulk(chunk.map((jobId) => ({ name: 'run', data: {}, opts: { ...opts, jobId } })));
  }
}

/**
 * One measurement: cancels the jobs over HTTP, the first `lead` of them unmeasured. `server` is the api or the floor.
 * Throws unless each answer is the expected 200.
 */
export function cancelAll(load, site, server, ids, concurrency, lead) {
  const expect = { status: 200, body: '"status":"cancelled"' };
  return send(load, site, server, { method: 'DELETE', paths: pathsOf(ids), concurrency, lead, expect });
}

export function createMany(load, site, server, count, concurrency) {
  return send(load, site, server, {
    method: 'POST',
    paths: Array(count).fill(JOBS),
    body: JSON.stringify({ user_email: 'ada@example.com', prompt: 'Discovery call with an IT director' }),
    concurrency,
    expect: { status: 201, body: '"status":"queued"' },
  });
}

export function getAll(load, site, server, ids, concurrency) {
  const expect = { status: 200, body: '"status":"queued"' };
  return send(load, site, server, { method: 'GET', paths: pathsOf(ids), concurrency, expect });
}

const pathsOf = (ids) => ids.map((id) => `${JOBS}/${id}`);

/** Has the load generator send the requests with the site's key. Throws unless each answer is as expected. */
function send(load, site, server, requests) {
  return load.ask('load', { port: server.port, key: site.key, ...requests });
}

/**
 * Throws unless every row is cancelled and no entry of the jobs is left in the queue, for which answers do not wait.
 */
export async function checkCancelled(site, ids) {
  const { rows } = await site.pool.query(
    `SELECT count(*)::int AS count FROM scenario_jobs WHERE id = ANY ($1) AND status = 'cancelled'`,
    [ids],
  );
  if (rows[0].count !== ids.length) throw new Error(`only ${rows[0].count} of ${ids.length} rows are cancelled`);
  const left = await soon(0, async () => {
    const pipeline = site.redis.pipeline();
    for (const id of ids) pipeline.exists(site.queue.toKey(id));
    return (await pipeline.exec()).filter(([, exists]) => exists !== 0).length;
  });
  if (left > 0) throw new Error(`${left} of ${ids.length} cancelled jobs are still in the queue`);
}

/** Counts until the number is the wanted one, for about a second. Returns the last count. */
async function soon(wanted, count) {
  let counted = await count();
  for (let tries = 0; counted !== wanted && tries < 100; tries++) {
    await new Promise((next) => setTimeout(next, 10));
    counted = await count();
  }
  return counted;
}

/** The scripts that Redis has run until now: how many, and for how long. */
export async function scriptsOf({ redis }) {
  const [, calls = 0, usec = 0] = /cmdstat_evalsha:calls=(\d+),usec=(\d+)/.exec(await redis.info('commandstats')) ?? [];
  return { calls: Number(calls), ms: Number(usec) / 1000 };
}

/**
 * Hears the messages to a simulated worker, and counts them. While it is paused, they wait on its connection: a real
 * worker is on another machine, and takes nothing from what the servers share here.
 */
export async function listen(site, workerId = `bench-${randomUUID()}`) {
  const subscriber = site.redis.duplicate();
  const listener = {
    workerId,
    heard: 0,
    pause: () => subscriber.stream.pause(),
    resume: () => subscriber.stream.resume(),
    close: () => subscriber.disconnect(),
  };
  subscriber.on('error', () => undefined);
  subscriber.on('message', () => listener.heard++);
  await subscriber.subscribe(`${site.prefix}:cancel:${workerId}`);
  return listener;
}

/** Throws unless as many messages have come as jobs were cancelled. */
export async function checkHeard(listener, count) {
  listener.resume();
  // The message is sent before the answer, but on another connection.
  const heard = await soon(count, () => listener.heard);
  if (heard !== count) throw new Error(`the worker received ${heard} messages, expected ${count}`);
}
