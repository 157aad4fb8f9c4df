import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { PrismaPg } from '@prisma/adapter-pg';
import { pino } from 'pino';
import { ApiKeyRepository } from '../src/auth/api-key.repository';
import { PrismaClient } from '../src/generated/prisma/client';
import { Database } from '../src/infrastructure/database';
import { isDatabaseUnavailable } from '../src/infrastructure/database-errors';
import { newId } from '../src/infrastructure/ids';
import { isTerminal, JOB_STATUSES, type JobStatus, TRANSITIONS } from '../src/modules/scenario-jobs/job-status';
import { JobRepository } from '../src/modules/scenario-jobs/job.repository';
import { eventually } from './support/eventually';
import { TcpProxy } from './support/tcp-proxy';
import { TestDatabase } from './support/test-database';

let own: TestDatabase;
const NEW_JOB = { userEmail: 'ada@example.com', prompt: 'p', context: null, scenarioSlug: null, requestId: null };
const RUN = (): string => `run_id = '${randomUUID()}', worker_id = 'w', started_at = COALESCE(started_at, now())`;

beforeAll(async () => {
  own = await TestDatabase.create();
});
afterAll(() => own.close());

describe('an error of Postgres', () => {
  // Connection, login, no such database, deadlock, resources, server shutdown, its disk, a standby, `lock_timeout`, an
  // internal error, a pooler without prepared statements, a database without the newest migration; then errors caused by
  // the statement or its values.
  const AWAY = ['08006', '28000', '3D000', '40P01', '40001', '53300', '57P03', '58030', '25006', '55P03', 'XX000'];
  const POOLER = ['42P05', '26000'];
  const NOT_MIGRATED = ['42P01', '42703'];
  const OURS = ['23505', '22P05', '42601', '23514', 'P0001'];
  it.each([
    ...[...AWAY, ...POOLER, ...NOT_MIGRATED].map((code) => [code, true] as const),
    ...OURS.map((code) => [code, false] as const),
  ])('%s says that it is away: %s', async (code, isAway) => {
    const raise = own.prisma().$executeRawUnsafe(`DO $$ BEGIN RAISE 'no' USING ERRCODE = '${code}'; END $$`);
    expect(isDatabaseUnavailable(await raise.catch((error: unknown) => error))).toBe(isAway);
  });

  it('is not needed to know that there is no way to it', async () => {
    // No connection can be made to the broadcast address: the system refuses it at once.
    const prisma = new PrismaClient({ adapter: new PrismaPg('postgres://a@255.255.255.255:5432/a') });
    const error: unknown = await prisma.$queryRaw`SELECT 1`.catch((one: unknown) => one);
    expect(String((error as Error).message)).toMatch(/connect E[A-Z]+ 255/);
    expect(isDatabaseUnavailable(error)).toBe(true);
  });

  it('is known by the first of several addresses, of which none answers', () => {
    const reasons = ['ENETUNREACH', 'ECONNREFUSED'].map((code) =>
      Object.assign(new Error(`connect ${code}`), { code }),
    );
    const error = Object.assign(new AggregateError(reasons), { code: 'ENETUNREACH' });
    expect(isDatabaseUnavailable(new Error('no', { cause: error }))).toBe(true);
  });
});

/** Updates that bring a row into each status, with the columns that the status requires. */
const TO: Record<JobStatus, () => string> = {
  queued: () => `status = 'queued', run_id = NULL, worker_id = NULL`,
  processing: () => `status = 'processing', ${RUN()}`,
  completed: () => `status = 'completed', completed_at = now(), ${RUN()}`,
  failed: () => `status = 'failed', completed_at = now(), error_code = 'X', error_message = 'x', ${RUN()}`,
  cancelled: () => `status = 'cancelled', completed_at = now(), cancelled_by = '${own.keyId}'`,
};

const update = (jobId: string, set: string) => own.pool.query(`UPDATE scenario_jobs SET ${set} WHERE id = $1`, [jobId]);

async function insert(): Promise<string> {
  const id = newId();
  await own.pool.query(
    `INSERT INTO scenario_jobs (id, workspace_id, user_email, prompt) VALUES ($1, $2, 'a@example.com', 'p')`,
    [id, own.workspace.id],
  );
  return id;
}

/** Moves a job to a status, with the scenario that a completed job needs. */
async function move(jobId: string, to: JobStatus) {
  const client = await own.pool.connect();
  try {
    await client.query('BEGIN');
    await client.query(`UPDATE scenario_jobs SET ${TO[to]()} WHERE id = $1`, [jobId]);
    if (to === 'completed') await client.query(INSERT_SCENARIO, [newId(), own.workspace.id, jobId]);
    await client.query('COMMIT');
  } catch (error) {
    await client.query('ROLLBACK');
    throw error;
  } finally {
    client.release();
  }
}
const INSERT_SCENARIO = `INSERT INTO scenarios (id, workspace_id, job_id, slug, name, content) VALUES ($1, $2, $3, $1, 'n', '{}')`;

async function jobIn(status: JobStatus): Promise<string> {
  const id = await insert();
  if (status !== 'queued' && status !== 'cancelled') await move(id, 'processing');
  if (status !== 'queued' && status !== 'processing') await move(id, status);
  return id;
}

describe('the database allows exactly the documented transitions', () => {
  const pairs = JOB_STATUSES.flatMap((from) =>
    JOB_STATUSES.filter((to) => to !== from).map((to) => [from, to] as const),
  );
  it.each(pairs)('%s to %s', async (from, to) => {
    const id = await jobIn(from);
    const allowed = (TRANSITIONS[from] as readonly string[]).includes(to);
    await (allowed
      ? expect(move(id, to)).resolves.toBeUndefined()
      : expect(move(id, to)).rejects.toThrow(/job \w+ |constraint/));
    expect((await own.row(id)).status).toBe(allowed ? to : from);
  });
});

describe('the database refuses', () => {
  it.each(JOB_STATUSES.filter(isTerminal))('to change anything of a %s job', async (status) => {
    const id = await jobIn(status);
    for (const set of [`prompt = 'other'`, `completed_at = now() + interval '1 hour'`, `attempt = attempt + 1`]) {
      await expect(update(id, set)).rejects.toThrow(/can no longer change/);
    }
  });

  it.each<[string, JobStatus, () => string]>([
    ['a queued job with a run', 'queued', RUN],
    ['a run without a worker', 'queued', () => `run_id = '${randomUUID()}'`],
    ['an unfinished job with an end', 'queued', () => 'completed_at = now()'],
    ['an unfinished job with an error', 'processing', () => `error_code = 'X', error_message = 'x'`],
    ['a running job without a start', 'processing', () => 'started_at = NULL'],
    ['a running job with a canceller', 'processing', () => `cancelled_by = '${own.keyId}'`],
    ['a cancelled job without a canceller', 'queued', () => `status = 'cancelled', completed_at = now()`],
    ['a cancelled job without an end', 'queued', () => `status = 'cancelled', cancelled_by = '${own.keyId}'`],
    [
      'a canceller that does not exist',
      'queued',
      () => `status = 'cancelled', completed_at = now(), cancelled_by = 'x'`,
    ],
    ['a failed job without an error', 'processing', () => `status = 'failed', completed_at = now()`],
    [
      'an end before the start',
      'processing',
      () => `status = 'failed', error_code = 'X', error_message = 'x', completed_at = now() - interval '1 h'`,
    ],
    ['a completed job without a scenario', 'processing', () => `status = 'completed', completed_at = now()`],
    ['a stop of a job that runs', 'processing', () => `stopped_at = now(), stopped_how = 'killed'`],
    ['a stop of a job that never ran', 'cancelled', () => `stopped_at = now(), stopped_how = 'killed'`],
  ])('%s', async (_what, status, set) => {
    const id = await jobIn(status);
    await expect(update(id, set())).rejects.toThrow();
    expect((await own.row(id)).status).toBe(status);
  });

  it('a scenario of a job that did not complete', async () => {
    for (const status of ['queued', 'processing', 'failed', 'cancelled'] as const) {
      const id = await jobIn(status);
      await expect(own.pool.query(INSERT_SCENARIO, [newId(), own.workspace.id, id])).rejects.toThrow(/to be completed/);
    }
  });

  it('a job that begins in any status but queued', async () => {
    const insertCancelled = `INSERT INTO scenario_jobs (id, workspace_id, user_email, prompt, status, completed_at, cancelled_by)
      VALUES ($1, $2, 'a@example.com', 'p', 'cancelled', now(), $3)`;
    await expect(own.pool.query(insertCancelled, [newId(), own.workspace.id, own.keyId])).rejects.toThrow(
      /must begin queued/,
    );
  });

  it.each(JOB_STATUSES.filter(isTerminal))('but not that a %s job is deleted, its scenario first', async (status) => {
    const id = await jobIn(status);
    await own.pool.query('DELETE FROM scenarios WHERE job_id = $1', [id]);
    const { rowCount } = await own.pool.query('DELETE FROM scenario_jobs WHERE id = $1', [id]);
    expect(rowCount).toBe(1);
  });

  it('but not that old jobs are deleted as docs/operations.md says', async () => {
    const operations = readFileSync(join(__dirname, '../docs/operations.md'), 'utf8');
    const [statement = ''] = /^WITH old AS[^;]*;/m.exec(operations) ?? [];
    // The jobs of this file are all new.
    const old = statement.replace(/now\(\) - interval '90 days'/, "now() + interval '1 day'");
    const open = [await jobIn('queued'), await jobIn('processing')];
    const stopping = await jobIn('processing');
    await move(stopping, 'cancelled');
    const finished = await Promise.all(JOB_STATUSES.filter(isTerminal).map(jobIn));
    expect((await own.pool.query(statement)).rowCount).toBe(0);
    await own.pool.query(old);
    const { rows } = await own.pool.query<{ id: string }>('SELECT id FROM scenario_jobs WHERE id = ANY ($1)', [
      [...open, stopping, ...finished],
    ]);
    expect(rows.map(({ id }) => id).sort()).toEqual([...open, stopping].sort());
  });

  it('to confirm a stop twice', async () => {
    const id = await jobIn('processing');
    await move(id, 'cancelled');
    await update(id, `stopped_at = now(), stopped_how = 'graceful'`);
    await expect(update(id, `stopped_how = 'killed'`)).rejects.toThrow(/can no longer change/);
  });
});

it('no more connections are made than DATABASE_POOL_SIZE says', async () => {
  const database = new Database({ DATABASE_URL: own.url, DATABASE_POOL_SIZE: 3 }, pino({ level: 'silent' }));
  const asked = Array.from(
    { length: 20 },
    () => database.$queryRaw<[{ pid: number }]>`
    SELECT pg_backend_pid() AS pid FROM pg_sleep(0.1)`,
  );
  const pids = (await Promise.all(asked)).map(([{ pid }]) => pid);
  expect(new Set(pids).size).toBeLessThanOrEqual(3);
  await database.$disconnect();
});

describe('a connection that Postgres ends', () => {
  it('right behind its greeting fails the transaction that it was for, and nothing else', async () => {
    const proxy = await TcpProxy.start(process.env.TEST_POSTGRES_URL!);
    const other = await TestDatabase.create();
    // Whatever follows within 300 ms arrives together with what it follows.
    let until = 0;
    proxy.slow(() => {
      if (performance.now() < until) return 0;
      until = performance.now() + 300;
      return 300;
    });
    try {
      const database = other.prisma('', proxy.through(other.url));
      const asked = database
        .$transaction((transaction) => transaction.$queryRaw`SELECT 1`)
        .catch((error: unknown) => error);
      await eventually('it has logged in, and is ended', async () => {
        const { rows } = await other.pool.query(
          `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
           WHERE datname = current_database() AND application_name = 'scenario-jobs ${process.pid}'`,
        );
        return rows.length > 0;
      });
      expect(isDatabaseUnavailable(await asked)).toBe(true);
      proxy.clear();
      expect(await database.$transaction((transaction) => transaction.$queryRaw`SELECT 1 AS one`)).toEqual([
        { one: 1 },
      ]);
    } finally {
      await other.close();
      await proxy.stop();
    }
  });
});

describe('a database with a time zone and a style of dates of its own', () => {
  const HOUR_MS = 3_600_000;

  it.each(['Asia/Kolkata', 'America/St_Johns'])('keeps the right times: %s', async (zone) => {
    const other = await TestDatabase.create();
    const name = new URL(other.url).pathname.slice(1);
    await other.pool.query(`ALTER DATABASE ${name} SET timezone = '${zone}'`);
    await other.pool.query(`ALTER DATABASE ${name} SET datestyle = 'SQL, DMY'`);
    // Options that the URL itself has count as well.
    const database = other.prisma('?options=-c%20work_mem%3D5MB');
    const { job } = (await new JobRepository(database).create(other.workspace.id, NEW_JOB))!;
    expect(Math.abs(Number(job.createdAt) - Date.now())).toBeLessThan(HOUR_MS / 2);
    const { id } = await new ApiKeyRepository(database).create('acme', 'ci', new Date(Date.now() + HOUR_MS));
    const { rows } = await other.pool.query<{ left: number }>(
      'SELECT EXTRACT(EPOCH FROM expires_at - now())::float8 * 1000 AS left FROM api_keys WHERE id = $1',
      [id],
    );
    expect(Math.abs(rows[0]!.left - HOUR_MS)).toBeLessThan(HOUR_MS / 2);
    expect(await database.$queryRaw`SHOW work_mem`).toEqual([{ work_mem: '5MB' }]);
    await other.close();
  });
});

describe('a database whose search_path leads to another schema', () => {
  it('has its jobs where Prisma has its models', async () => {
    const other = await TestDatabase.create();
    const name = new URL(other.url).pathname.slice(1);
    await other.pool.query(
      'CREATE SCHEMA app; CREATE TABLE app.scenario_jobs (LIKE public.scenario_jobs INCLUDING ALL)',
    );
    await other.pool.query(`ALTER DATABASE ${name} SET search_path = app, public`);
    const database = other.prisma();
    const { job } = (await new JobRepository(database).create(other.workspace.id, NEW_JOB))!;
    expect(await database.job.findMany({ select: { id: true } })).toEqual([{ id: job.id }]);
    await other.close();
  });
});
