// Fills what `growth` makes large: a table of millions of rows, thousands of keys, a queue of a million entries.
import { addEntries, insertRows, newIds } from './site.mjs';

/** Indexes, besides the primary key, that are rebuilt after the rows are in, which is many times faster. */
const INDEXES = [
  'scenario_jobs_workspace_id_request_id_key',
  'scenario_jobs_unfinished',
  'scenario_jobs_owed_by_worker',
];

/**
 * Inserts rows of jobs that have ended. The triggers are off meanwhile, because they allow only queued jobs to be
 * inserted, and the indexes are rebuilt afterwards. Every check of the table holds for every row.
 */
export async function fillTable(pool, workspaceId, rows) {
  const client = await pool.connect();
  try {
    const { rows: definitions } = await client.query(
      'SELECT indexname, indexdef FROM pg_indexes WHERE indexname = ANY ($1)',
      [INDEXES],
    );
    await client.query('ALTER TABLE scenarios DROP CONSTRAINT scenarios_job_id_fkey');
    await client.query('ALTER TABLE scenario_jobs DROP CONSTRAINT scenario_jobs_pkey');
    for (const { indexname } of definitions) await client.query(`DROP INDEX ${indexname}`);
    await client.query('ALTER TABLE scenario_jobs DISABLE TRIGGER ALL');
    await insert(client, workspaceId, rows);
    await client.query('ALTER TABLE scenario_jobs ENABLE TRIGGER ALL');
    await client.query('ALTER TABLE scenario_jobs ADD CONSTRAINT scenario_jobs_pkey PRIMARY KEY (id)');
    for (const { indexdef } of definitions) await client.query(indexdef);
    await client.query(
      `ALTER TABLE scenarios ADD CONSTRAINT scenarios_job_id_fkey FOREIGN KEY (job_id) REFERENCES scenario_jobs (id)
       ON DELETE RESTRICT ON UPDATE CASCADE`,
    );
  } finally {
    client.release();
  }
}

async function insert(client, workspaceId, rows) {
  await client.query(
    `INSERT INTO scenario_jobs (id, workspace_id, status, user_email, prompt, attempt, run_id, worker_id, created_at,
       started_at, completed_at, cancelled_by, error_code, error_message, stopped_at, stopped_how)
     SELECT 'z' || substr(md5(i::text), 1, 11), $1, status::job_status, 'ada@example.com',
       'Discovery call with an IT director', 1, md5('run' || i)::uuid, 'worker-' || i % 200,
       now() - interval '1 day', now() - interval '1 day', now() - interval '23 hours',
       CASE WHEN status = 'cancelled' THEN 'k00000000001' END,
       CASE WHEN status = 'failed' THEN 'GENERATION_ERROR' END, CASE WHEN status = 'failed' THEN 'It failed' END,
       CASE WHEN status = 'cancelled' THEN now() - interval '23 hours' END,
       CASE WHEN status = 'cancelled' THEN 'graceful'::stop_kind END
     FROM (SELECT i, CASE WHEN i % 2 = 0 THEN 'cancelled' ELSE 'failed' END AS status
           FROM generate_series(1, $2::int) AS i) AS job`,
    [workspaceId, rows],
  );
}

/** Adds keys, each of a workspace of its own. */
export async function fillKeys(pool, count) {
  await pool.query(
    `INSERT INTO workspaces (id, slug) SELECT 'filler' || i, 'filler-' || i FROM generate_series(1, $1::int) AS i`,
    [count],
  );
  await pool.query(
    `INSERT INTO api_keys (id, workspace_id, name, hash)
     SELECT 'filler' || i, 'filler' || i, 'filler', md5(i::text) || md5('more' || i) FROM generate_series(1, $1::int) AS i`,
    [count],
  );
}

/**
 * Adds queued jobs of which the table's statistics know nothing, as after a burst of requests: Postgres has analysed
 * the table before, and will not do so again.
 */
export async function fillUnseen(site, count) {
  await site.pool.query('VACUUM ANALYZE');
  await site.pool.query('ALTER TABLE scenario_jobs SET (autovacuum_enabled = false)');
  await insertRows(site, newIds(count));
}

/** Adds entries of jobs that nobody cancels. */
export async function fillQueue(queue, count) {
  const chunk = 50_000;
  for (let start = 0; start < count; start += chunk) {
    const length = Math.min(chunk, count - start);
    const ids = Array.from({ length }, (_, index) => `y${String(start + index).padStart(11, '0')}`);
    await addEntries(queue, ids);
  }
}

/** Waits until Redis has finished rewriting its append-only file, and Postgres has written a checkpoint. */
export async function settle({ pool, redis }) {
  await pool.query('CHECKPOINT');
  while (/aof_rewrite_in_progress:1|aof_rewrite_scheduled:1/.test(await redis.info('persistence'))) {
    await new Promise((next) => setTimeout(next, 200));
  }
}
