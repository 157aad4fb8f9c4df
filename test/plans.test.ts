import { hashApiKey } from '../src/auth/api-key';
import { type Database } from '../src/infrastructure/database';
import { newId } from '../src/infrastructure/ids';
import { JobRepository } from '../src/modules/scenario-jobs/job.repository';
import { RunRepository } from '../src/modules/scenario-jobs/run.repository';
import { WorkerRepository } from '../src/modules/scenario-jobs/worker.repository';
import { ActiveRun } from '../src/modules/scenario-jobs/worker/active-runs';
import { eventually } from './support/eventually';
import { TestDatabase } from './support/test-database';

const CROWD = 20_000;
const WORKER_LOST_MS = 60_000;
/** The most statements of one of the lives below, and the most rows that each may read: its own, and a generous few. */
const MOST_STATEMENTS = 10;
const MOST_ROWS = 10;

/** How Postgres reaches a row depends on what it believes the table holds, and it may know nothing yet. */
describe('what is asked about one job', () => {
  let own: TestDatabase;
  let database: Database;
  let jobs: JobRepository;
  let runs: RunRepository;
  let workers: WorkerRepository;
  beforeEach(async () => {
    own = await TestDatabase.create();
    await own.pool.query('ALTER TABLE scenario_jobs SET (autovacuum_enabled = false)');
    // One statement at a time, all on one connection, where Postgres fixes a statement's plan after a few executions.
    database = own.prisma();
    jobs = new JobRepository(database);
    runs = new RunRepository(database);
    workers = new WorkerRepository(database);
    await workers.reportAlive('worker');
  });
  afterEach(() => own.close());

  const cancel = (jobId: string) =>
    jobs.cancel({ keyHash: hashApiKey(own.key), jobId, idempotencyKey: `cancel ${jobId}` });

  const find = (jobId: string) => jobs.find({ keyHash: hashApiKey(own.key), jobId });

  /** Every kind of statement about one job, in one of three lives. Returns how many updates that makes. */
  async function live(jobId: string, life: number): Promise<number> {
    const run = new ActiveRun(jobId);
    const claim = () => runs.claim(run, 'worker', WORKER_LOST_MS);
    await claim();
    expect(await runs.requeue(run, { countsAsAttempt: false })).toBe(true);
    await claim();
    expect(await claim()).toBe('taken');
    expect(await workers.findOwed('worker')).toHaveLength(1);
    expect(await workers.reportAlive('worker')).toHaveLength(1);
    expect(await find(jobId)).toMatchObject({ job: { status: 'processing' } });
    if (life % 3 === 0) expect(await runs.complete(run, { name: 'n', slug: newId(), content: {} })).toBe(true);
    if (life % 3 === 1) expect(await runs.fail(run, { code: 'X', message: 'x' })).toBe(true);
    if (life % 3 === 2) {
      expect(await cancel(jobId)).toBeDefined();
      expect(await find(jobId)).toMatchObject({ cancelIdempotencyKey: `cancel ${jobId}` });
      expect(await runs.confirmStopped(run, 'graceful')).toBeDefined();
    }
    expect(await runs.findEnd(run)).not.toBeNull();
    return life % 3 === 2 ? 5 : 4;
  }

  async function liveAll(ids: string[]): Promise<number> {
    let updates = 0;
    for (const [life, id] of ids.entries()) updates += await live(id, life);
    return updates;
  }

  /** Cancels these jobs at once: the first two alone, the others with one statement. */
  async function cancelTogether(ids: string[]): Promise<number> {
    expect(await Promise.all(ids.map(cancel))).not.toContain(undefined);
    return ids.length;
  }

  /** How many rows of jobs all statements have read, once `updated` updates are counted. */
  async function rowsRead(updated: number): Promise<number> {
    const counted = await eventually(`${updated} updates are counted`, async () => {
      const { rows } = await own.pool.query<{ updated: number; read: number }>(`
        SELECT n_tup_upd::int AS updated,
          (seq_tup_read + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes i WHERE i.relid = t.relid))::int AS read
        FROM pg_stat_user_tables t WHERE relname = 'scenario_jobs'`);
      return rows[0]!.updated === updated && rows[0];
    });
    return counted.read;
  }

  it.each([
    ['there are no statistics of the table', { ended: 0, of: 'this workspace', early: 0 }],
    ['there are none, and few jobs were there at first', { ended: 0, of: 'this workspace', early: 18 }],
    ['its statistics are of a time with an empty queue', { ended: 500, of: 'this workspace', early: 0 }],
    ['they know nothing of the workspace', { ended: 500, of: 'another workspace', early: 0 }],
  ])('looks at that one only, also when %s', async (_when, { ended, of, early }) => {
    if (ended > 0) {
      const { workspace } = of === 'another workspace' ? await own.createWorkspace() : own;
      await own.insertQueued(ended, workspace.id);
      await own.pool.query(`UPDATE scenario_jobs SET status = 'cancelled', completed_at = now(), cancelled_by = $1`, [
        own.keyId,
      ]);
      await own.pool.query('VACUUM ANALYZE scenario_jobs');
    }
    const before = await rowsRead(ended);
    let updates = await liveAll(await own.insertQueued(early));
    for (let batch = 0; batch < early; batch++) updates += await cancelTogether(await own.insertQueued(4));
    const ids = await own.insertQueued(CROWD);
    updates += await liveAll(ids.slice(0, 24));
    updates += await cancelTogether(ids.slice(24, 44));
    // A connection reports its counts when it ends.
    await database.$disconnect();
    const after = await rowsRead(ended + updates);
    const statements = MOST_STATEMENTS * (early + 24) + 4 * early + 20;
    expect(after - before).toBeLessThan(statements * MOST_ROWS);
  });
});
