import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { pino } from 'pino';
import { hashApiKey } from '../../src/auth/api-key';
import { ApiKeyRepository } from '../../src/auth/api-key.repository';
import { parseSettings } from '../../src/config/settings';
import { type Database } from '../../src/infrastructure/database';
import { Metrics } from '../../src/infrastructure/metrics';
import { CancelJob } from '../../src/modules/scenario-jobs/api/cancel-job';
import { JobQueue } from '../../src/modules/scenario-jobs/job-queue';
import { isCancellable, type JobStatus } from '../../src/modules/scenario-jobs/job-status';
import { JobRepository } from '../../src/modules/scenario-jobs/job.repository';
import { RepairRepository } from '../../src/modules/scenario-jobs/repair.repository';
import { type NewRun, type Run, RunRepository } from '../../src/modules/scenario-jobs/run.repository';
import { ActiveRun } from '../../src/modules/scenario-jobs/worker/active-runs';
import { Reconciler } from '../../src/modules/scenario-jobs/worker/reconciler';
import { eventually } from '../support/eventually';
import { TestSystem } from '../support/test-system';

const ROUNDS = 40;
const LOST_MS = 60_000;
/** A queue from which no worker takes anything. In these tests the real worker's reconciler never gets a turn. */
const NO_WORKER = { RECONCILE_MS: 1, QUEUE_PREFIX: '{nobody}' };
const SCENARIO = { name: 'Race', slug: 'race', content: {} };

let system: TestSystem;
beforeAll(async () => {
  system = await TestSystem.start({ workers: 1, settings: { WORKER_CONCURRENCY: '4', RECONCILE_MS: '3600000' } });
});
afterAll(() => system.stop());

describe('whoever writes first wins, and the other learns of it', () => {
  let database: Database;
  let jobs: JobRepository;
  let runs: RunRepository;
  beforeAll(async () => {
    // Registers the worker of these runs; otherwise the real one's reconciler would take the runs for lost.
    await system.pool.query(`INSERT INTO workers (id, seen_at) VALUES ('worker-1', now() + interval '1 hour')`);
    database = system.prisma();
    jobs = new JobRepository(database);
    runs = new RunRepository(database);
  });

  /** A job that no queue knows, so that only this test moves it. */
  const newJob = async () => {
    const job = { userEmail: 'ada@example.com', prompt: 'race', context: null, scenarioSlug: null, requestId: null };
    return (await jobs.create(system.workspace.id, job))!.job.id;
  };
  const newRun = async (): Promise<NewRun> => {
    const run = new ActiveRun(await newJob());
    if (!isClaimed(await runs.claim(run, 'worker-1', LOST_MS))) throw new Error('not claimed');
    return run;
  };
  const isClaimed = (claim: Awaited<ReturnType<RunRepository['claim']>>) => typeof claim === 'object';
  const status = async (jobId: string) => (await system.row(jobId)).status;
  /** Cancels again until the row is not locked, and so has decided. */
  const cancel = async (jobId: string) => {
    for (;;) {
      const cancelled = await jobs.cancel({ keyHash: hashApiKey(system.key), jobId, idempotencyKey: null });
      if (cancelled || !isCancellable((await status(jobId)) as JobStatus)) return cancelled;
    }
  };

  /** Starts both at the same time, in an order that alternates from round to round. */
  async function together<A, B>(round: number, one: () => Promise<A>, other: () => Promise<B>): Promise<[A, B]> {
    if (round % 2 === 0) return Promise.all([one(), other()]);
    const [second, first] = await Promise.all([other(), one()]);
    return [first, second];
  }

  it('cancel against claim', async () => {
    for (let round = 0; round < ROUNDS; round++) {
      const run = new ActiveRun(await newJob());
      const [cancelled, claimed] = await together(
        round,
        () => cancel(run.jobId),
        () => runs.claim(run, 'worker-1', LOST_MS),
      );
      expect(cancelled).toBeDefined();
      // If the claim came first, the cancel knows of the run and can stop it.
      expect(cancelled!.run?.id ?? null).toBe(isClaimed(claimed) ? run.runId : null);
      expect(await status(run.jobId)).toBe('cancelled');
      expect(await runs.complete(run, SCENARIO)).toBe(false);
    }
  });

  it.each([
    ['complete', (run: Run) => runs.complete(run, SCENARIO), 'completed'],
    ['fail', (run: Run) => runs.fail(run, { code: 'X', message: 'x' }), 'failed'],
  ])('cancel against %s', async (_name, finish, finished) => {
    for (let round = 0; round < ROUNDS; round++) {
      const run = await newRun();
      const [cancelled, recorded] = await together(
        round,
        () => cancel(run.jobId),
        () => finish(run),
      );
      expect([cancelled !== undefined, recorded]).toContain(true);
      expect(cancelled !== undefined && recorded).toBe(false);
      expect(await status(run.jobId)).toBe(cancelled ? 'cancelled' : finished);
      expect(await system.scenarioCount(run.jobId)).toBe(!cancelled && finished === 'completed' ? 1 : 0);
    }
  });

  it('cancel against the revocation of its key', async () => {
    const { key, keyId } = await system.createKey(system.workspace.id);
    const hash = hashApiKey(key);
    /** Finds the row locked the first time, and revokes the key then. */
    class Revoked extends JobRepository {
      override async cancel(request: Parameters<JobRepository['cancel']>[0]) {
        const works = await new ApiKeyRepository(database).revoke(keyId);
        return works ? undefined : super.cancel(request);
      }
    }
    const logger = pino({ level: 'silent' });
    const settings = parseSettings(system.settings);
    const queue = new JobQueue(settings, logger);
    const cancelJob = new CancelJob(new Revoked(database), queue, new Metrics(), logger);
    const identify = async () => {
      const owner = await new ApiKeyRepository(database).findOwner(hash);
      if (!owner) throw new Error('the key does not work');
      return owner;
    };
    const presented = { hash, identify, recordCaller: () => undefined };
    await expect(cancelJob.cancel(presented, await newJob(), null)).rejects.toThrow('the key does not work');
    await queue.onApplicationShutdown();
  });

  const connected = (queue: JobQueue) => eventually('Redis is connected', () => queue.ping().then(() => true));

  it('cancel against the reconciler, which has just read that the job is queued', async () => {
    const logger = pino({ level: 'silent' });
    const settings = { ...parseSettings(system.settings), ...NO_WORKER };
    const queue = new JobQueue(settings, logger);
    await connected(queue);
    const metrics = new Metrics();
    const [jobId] = (await system.insertQueued(1)) as [string];
    await system.pool.query(`UPDATE scenario_jobs SET created_at = now() - interval '1 hour' WHERE id = $1`, [jobId]);
    let passes = 0;
    class Behind extends RepairRepository {
      override exclusively = (work: () => Promise<void>) => work();
      override async findDependingOnQueue(...asked: Parameters<RepairRepository['findDependingOnQueue']>) {
        const page = await super.findDependingOnQueue(...asked);
        if (passes++ === 0) {
          expect(page).toContainEqual({ jobId, runId: null });
          expect(await cancel(jobId)).toBeDefined();
        }
        return page;
      }
    }
    const reconciler = new Reconciler(new Behind(database), queue, metrics, settings, logger);
    reconciler.start();
    await eventually('one pass is over', () => passes > 1);
    await reconciler.stop();
    expect((await metrics.repairs.get()).values.map(({ value }) => value)).toEqual([0, 0, 0, 0, 0]);
    expect(await queue.missing([jobId])).toEqual([jobId]);
    expect(await system.redis.exists(`{nobody}:scenario-jobs:${jobId}`)).toBe(0);
    await queue.onApplicationShutdown();
  });

  it('cancel against the reconciler, which is just putting the job into the queue', async () => {
    const logger = pino({ level: 'silent' });
    const settings = { ...parseSettings(system.settings), ...NO_WORKER };
    const [jobId] = (await system.insertQueued(1)) as [string];
    await system.pool.query(`UPDATE scenario_jobs SET created_at = now() - interval '1 hour' WHERE id = $1`, [jobId]);
    let cancels = 0;
    class Behind extends JobQueue {
      override async addAgain(id: string) {
        if (id === jobId && (await cancel(id))) cancels++;
        await super.addAgain(id);
      }
    }
    const queue = new Behind(settings, logger);
    await connected(queue);
    const reconciler = new Reconciler(new RepairRepository(database), queue, new Metrics(), settings, logger);
    reconciler.start();
    await eventually('it has been cancelled meanwhile', () => cancels === 1);
    await reconciler.stop();
    expect(await queue.missing([jobId])).toEqual([jobId]);
    expect(await system.redis.exists(`{nobody}:scenario-jobs:${jobId}`)).toBe(0);
    await queue.onApplicationShutdown();
  });

  it('the reconciler against a job that is in the queue, wherever it is there', async () => {
    const settings = { ...parseSettings(system.settings), ...NO_WORKER };
    const queue = new JobQueue(settings, pino({ level: 'silent' }));
    await connected(queue);
    const dueIn = (ms: number) => (Date.now() + ms) * 4096;
    await system.redis.zadd('{nobody}:scenario-jobs:delayed', dueIn(60_000), 'soon', dueIn(3_600_000), 'late');
    await system.redis.zadd('{nobody}:scenario-jobs:prioritized', 1, 'next');
    // BullMQ puts a job whose lock has expired into `wait`.
    const lists = ['active', 'wait', 'paused'];
    for (const list of lists) await system.redis.rpush(`{nobody}:scenario-jobs:${list}`, list);
    expect(await queue.missing(['soon', 'late', 'next', ...lists, 'nowhere'])).toEqual(['late', 'nowhere']);
    await queue.onApplicationShutdown();
  });

  it('cancel against requeue', async () => {
    for (let round = 0; round < ROUNDS; round++) {
      const run = await newRun();
      const [cancelled, requeued] = await together(
        round,
        () => cancel(run.jobId),
        () => runs.requeue(run, { countsAsAttempt: true }),
      );
      expect(cancelled).toBeDefined();
      expect(cancelled!.run).toEqual(
        requeued ? null : { id: run.runId, workerId: 'worker-1', stopToken: run.stopToken },
      );
      expect(await status(run.jobId)).toBe('cancelled');
    }
  });

  it('cancel against cancel', async () => {
    for (let round = 0; round < ROUNDS; round++) {
      const { jobId } = await newRun();
      const answers = await together(
        round,
        () => cancel(jobId),
        () => cancel(jobId),
      );
      expect(answers.filter((answer) => answer !== undefined)).toHaveLength(1);
    }
  });

  it.each([
    ['cancelled', (run: NewRun) => cancel(run.jobId)],
    ['completed', (run: NewRun) => runs.complete(run, SCENARIO)],
    ['failed', (run: NewRun) => runs.fail(run, { code: 'X', message: 'x' })],
  ])('whatever the clock does: a job is %s no sooner than it began', async (status, end) => {
    const run = await newRun();
    // As if the clock of Postgres had been set back since.
    await system.pool.query(`UPDATE scenario_jobs SET started_at = now() + interval '1 hour' WHERE id = $1`, [
      run.jobId,
    ]);
    await end(run);
    const row = await system.row(run.jobId);
    expect(row).toMatchObject({ status, completed_at: row.started_at });
  });

  it('one run against another that has taken over', async () => {
    const first = new ActiveRun(await newJob());
    await runs.claim(first, 'a worker that is dead', LOST_MS);
    const second = new ActiveRun(first.jobId);
    const { started_at: startedAt } = await system.row(first.jobId);
    expect(await runs.claim(second, 'worker-1', LOST_MS)).toMatchObject({ attempt: 2 });
    // Nor is a run requeued whose worker lives, or has come back since.
    await new RepairRepository(database).requeueLost([first, second], LOST_MS);
    expect(await system.row(first.jobId)).toMatchObject({
      status: 'processing',
      run_id: second.runId,
      started_at: startedAt,
    });
    expect(await runs.complete(first, SCENARIO)).toBe(false);
    expect(await runs.fail(first, { code: 'X', message: 'x' })).toBe(false);
    expect(await runs.requeue(first, { countsAsAttempt: true })).toBe(false);
    expect(await runs.complete(second, SCENARIO)).toBe(true);
    expect(await runs.findEnd(first)).toBeNull();
    expect(await runs.findEnd(second)).toMatchObject({ status: 'completed' });
  });

  it('a run takes over from nobody who lives, and begins nothing that has ended', async () => {
    const first = await newRun();
    const second = new ActiveRun(first.jobId);
    expect(await runs.claim(second, 'worker-1', LOST_MS)).toBe('taken');
    expect(await runs.complete(first, { ...SCENARIO, slug: 'undisturbed' })).toBe(true);
    expect(await runs.claim(second, 'worker-1', LOST_MS)).toBe('finished');
    expect(await system.row(first.jobId)).toMatchObject({ status: 'completed', attempt: 1 });
  });

  it('two completions that choose the same slug at once', async () => {
    const ten = await Promise.all(Array.from({ length: 10 }, newRun));
    const recorded = await Promise.all(ten.map((run) => runs.complete(run, { ...SCENARIO, slug: 'same-slug' })));
    expect(recorded).toEqual(ten.map(() => true));
  });

  it('a slug that only another workspace has used is free', async () => {
    const { workspace } = await system.createWorkspace();
    const [jobId] = await system.insertQueued(1, workspace.id);
    const theirs = new ActiveRun(jobId!);
    expect(isClaimed(await runs.claim(theirs, 'worker-1', LOST_MS))).toBe(true);
    for (const run of [await newRun(), theirs]) await runs.complete(run, { ...SCENARIO, slug: 'everywhere' });
    const { rows } = await system.pool.query('SELECT slug FROM scenarios WHERE job_id = $1', [jobId]);
    expect(rows).toEqual([{ slug: 'everywhere' }]);
  });

  it('a confirmation counts once, and only for the run that was cancelled', async () => {
    const run = await newRun();
    expect(await runs.confirmStopped(run, 'killed')).toBeUndefined();
    await cancel(run.jobId);
    expect(await runs.confirmStopped({ ...run, runId: randomUUID() }, 'killed')).toBeUndefined();
    expect(await runs.confirmStopped(run, 'graceful')).toBeGreaterThanOrEqual(0);
    expect(await runs.confirmStopped(run, 'killed')).toBeUndefined();
    expect((await system.row(run.jobId)).stopped_how).toBe('graceful');
  });
});

describe('a cancel at any moment of a real run', () => {
  it('once it has its 200, the job stays cancelled and leaves no scenario', async () => {
    const began = performance.now();
    await system.untilStatus((await system.create('slow 20')).id, 'completed');
    const wholeMs = performance.now() - began;
    const answers = new Map<string, number>();
    for (let moment = 0; moment < 20; moment++) {
      const { id } = await system.create('slow 20');
      await sleep((moment / 10) * wholeMs); // From queued to long completed.
      const { status, body } = await system.cancel(id);
      answers.set(id, status);
      if (status === 200) {
        if ((await system.row(id)).run_id) await system.untilStopped(id);
        continue;
      }
      const message = "Cannot cancel job in 'completed' state";
      expect({ status, message: body.error.message }).toEqual({ status: 400, message });
    }
    const found = new Set<string>();
    for (const [id, status] of answers) {
      const row = await system.row(id);
      expect(row.status).toBe(status === 200 ? 'cancelled' : 'completed');
      expect(await system.scenarioCount(id)).toBe(row.status === 'completed' ? 1 : 0);
      found.add(`${row.status}, ${row.run_id ? 'begun' : 'not begun'}`);
    }
    expect([...found]).toEqual(expect.arrayContaining(['cancelled, begun', 'completed, begun']));
  });

  it('two hundred cancels of one running job: one 200, the rest 400', async () => {
    const { job } = await system.createRunning('cooperative');
    const answers = await Promise.all(Array.from({ length: 200 }, () => system.cancel(job.id)));
    expect(answers.filter(({ status }) => status === 200)).toHaveLength(1);
    const refused = answers.filter(({ status }) => status === 400);
    expect(refused).toHaveLength(199);
    expect(refused.every(({ body }) => body.error.message === "Cannot cancel job in 'cancelled' state")).toBe(true);
    await system.untilStopped(job.id);
  });
});
