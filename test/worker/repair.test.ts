import { spawn } from 'node:child_process';
import { pino } from 'pino';
import { Database } from '../../src/infrastructure/database';
import { RepairRepository } from '../../src/modules/scenario-jobs/repair.repository';
import { type Run, RunRepository } from '../../src/modules/scenario-jobs/run.repository';
import { WorkerRepository } from '../../src/modules/scenario-jobs/worker.repository';
import { ActiveRun } from '../../src/modules/scenario-jobs/worker/active-runs';
import { eventually } from '../support/eventually';
import { type OwnRedis } from '../support/own-redis';
import { DIST } from '../support/service-process';
import { TcpProxy } from '../support/tcp-proxy';
import { isAlive, isFrozen, SOON_LOST, TestSystem } from '../support/test-system';
import { startWithOwnRedis } from '../support/with-own-redis';

describe('what the queue forgets, the rows know', () => {
  let redis: OwnRedis;
  let system: TestSystem;
  beforeEach(async () => {
    ({ redis, system } = await startWithOwnRedis({ WORKER_CONCURRENCY: '2' }));
  });
  afterEach(async () => {
    await system.stop();
    await redis.stop();
  });

  it('Redis emptied while jobs wait and run: every job still ends, and the cancelled ones stay cancelled', async () => {
    const running = await Promise.all([system.createPatient(), system.createRunning('cooperative')]);
    const waiting = await Promise.all([1, 2, 3, 4, 5, 6].map(() => system.create('quick')));
    const cancelledBefore = waiting.slice(0, 2);
    for (const { id } of cancelledBefore) expect((await system.cancel(id)).status).toBe(200);

    await system.redis.flushall();

    const cancelledAfter = waiting.slice(2, 4);
    for (const { id } of cancelledAfter) expect((await system.cancel(id)).status).toBe(200);
    expect((await system.cancel(running[1].job.id)).status).toBe(200);

    for (const { id } of waiting.slice(4)) await system.untilStatus(id, 'completed');
    // A run goes on without the queue: its worker lives, and the row is all it needs.
    await running[0].finish();
    await system.untilStatus(running[0].job.id, 'completed');
    expect((await system.row(running[0].job.id)).attempt).toBe(1);
    await system.untilStopped(running[1].job.id);
    for (const { id } of [...cancelledBefore, ...cancelledAfter]) {
      expect(await system.row(id)).toMatchObject({ status: 'cancelled', started_at: null, attempt: 0 });
    }
  });

  it.each([
    ['the order of those that wait', (keyOf: (name: string) => string) => [keyOf('prioritized')]],
    ['their entries', (keyOf: (name: string) => string, ids: string[]) => ids.map(keyOf)],
  ])('Redis loses a part, %s: every job still ends', async (_what, lost) => {
    const busy = await Promise.all([system.createRunning('cooperative'), system.createRunning('cooperative')]);
    const waiting = await Promise.all([1, 2, 3, 4].map(() => system.create('quick')));
    const keyOf = (name: string) => `${system.settings.QUEUE_PREFIX}:scenario-jobs:${name}`;
    const ids = waiting.map(({ id }) => id);
    const keys = lost(keyOf, ids);
    expect(await system.redis.del(...keys)).toBe(keys.length);
    for (const { job } of busy) await system.cancel(job.id);
    for (const id of ids) await system.untilStatus(id, 'completed');
    for (const id of ids) expect((await system.row(id)).attempt).toBe(1);
  });

  it('a job whose turn is in an hour, by the clock of a worker that was ahead, has it sooner', async () => {
    const busy = await Promise.all([system.createRunning('cooperative'), system.createRunning('cooperative')]);
    const { id } = await system.create('quick');
    const keyOf = (name: string) => `${system.settings.QUEUE_PREFIX}:scenario-jobs:${name}`;
    expect(await system.redis.zrem(keyOf('prioritized'), id)).toBe(1);
    await system.redis.zadd(keyOf('delayed'), (Date.now() + 3_600_000) * 4096, id);
    for (const { job } of busy) await system.cancel(job.id);
    await system.untilStatus(id, 'completed');
  });

  it('a run whose worker died together with Redis is begun again', async () => {
    const { job, finish } = await system.createPatient();
    system.workers[0]!.signal('SIGKILL');
    await system.redis.flushall();
    const worker = await system.startWorker({ ...SOON_LOST, LOCK_MS: '60000' });
    await finish();
    expect((await system.untilStatus(job.id, 'completed')).status).toBe('completed');
    expect((await system.row(job.id)).attempt).toBe(2);
    expect(await worker.metrics()).toMatch(/^scenario_jobs_repairs_total\{repair="requeued"\} 1$/m);
  });

  it('a row that somebody has locked keeps no other job from its repair', async () => {
    const [cancelled, lost] = await Promise.all([
      system.createRunning('cooperative'),
      system.createRunning('cooperative'),
    ]);
    system.workers[0]!.signal('SIGSTOP');
    expect((await system.cancel(cancelled.job.id)).status).toBe(200);
    system.workers[0]!.signal('SIGKILL');
    const repairing = async () => {
      const waiting = await Promise.all([1, 2, 3, 4].map(() => system.create('quick')));
      await system.redis.flushall();
      await system.startWorker(SOON_LOST);
      for (const { id } of waiting) await system.untilStatus(id, 'completed');
    };
    await system.lockRow(cancelled.job.id, () => system.lockRow(lost.job.id, repairing));
    expect(await system.untilStopped(cancelled.job.id)).toMatchObject({ stopped_how: 'worker_lost' });
    await eventually('the other one runs again', async () => (await system.row(lost.job.id)).attempt === 2);
  });

  it('a doorbell that Redis refuses ends no worker, and is heard once Redis refuses it no more', async () => {
    const { job } = await system.createRunning('cooperative');
    await redis.command('ACL', 'SETUSER', 'default', 'resetchannels');
    await redis.command('CLIENT', 'KILL', 'TYPE', 'pubsub');
    await system.workers[0]!.untilLogged('doorbell could not be subscribed to, will try again');
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.untilStopped(job.id);
    expect(system.workers[0]!.exit).toBeUndefined();
    await redis.command('ACL', 'SETUSER', 'default', 'allchannels');
    await eventually('it is subscribed', async () =>
      String(await redis.command('PUBSUB', 'CHANNELS')).includes(':cancel:'),
    );
  });

  it('a job that was created while Redis was away runs when it is back', async () => {
    redis.pause();
    const created = await system.create('quick');
    expect(created.status).toBe('queued');
    await system.api.untilLogged('job could not be queued; the reconciler will queue it', created.id);
    redis.resume();
    await system.untilStatus(created.id, 'completed');
  });

  it('a cancel while Redis is away is answered in time, and the task ends by the poll', async () => {
    const { job, pid } = await system.createRunning('cooperative');
    redis.pause();
    const { status } = await system.cancel(job.id);
    expect(status).toBe(200);
    await system.untilStopped(job.id);
    expect(isAlive(pid)).toBe(false);
    redis.resume();
  });

  it('a job cancelled while Redis was away never starts, although its queue entry is still there', async () => {
    const busy = await Promise.all([system.createRunning('cooperative'), system.createRunning('cooperative')]);
    const { id } = await system.create('quick');
    redis.pause();
    expect((await system.cancel(id)).status).toBe(200);
    redis.resume();
    for (const { job } of busy) await system.cancel(job.id);
    await eventually('the entry was delivered and dropped', async () => (await system.isQueued(id)) === 0);
    expect(await system.row(id)).toMatchObject({ status: 'cancelled', attempt: 0, started_at: null });
  });

  it('Redis restarted: workers take up their work again by themselves', async () => {
    await redis.restart();
    const { id } = await system.create('quick');
    await system.untilStatus(id, 'completed');
    const { job } = await system.createRunning('cooperative');
    await system.cancel(job.id);
    await system.untilStopped(job.id);
  });
});

/** A program that freezes in the middle of a pass. */
const FREEZES = `
  const { Database } = require('./infrastructure/database.js');
  const { RepairRepository } = require('./modules/scenario-jobs/repair.repository.js');
  const database = new Database({ DATABASE_URL: process.argv[1], DATABASE_POOL_SIZE: 2 }, console);
  const freeze = async () => process.kill(process.pid, 'SIGSTOP');
  void new RepairRepository(database).exclusively(freeze, 1000);
`;

describe('the reconciler', () => {
  let system: TestSystem;
  let repairs: RepairRepository;
  // No worker, because its own reconciler would be first.
  beforeAll(async () => {
    system = await TestSystem.start({ workers: 0 });
    repairs = new RepairRepository(system.prisma());
  });
  afterAll(() => system.stop());

  async function runBy(workerId: string): Promise<Run> {
    const run = new ActiveRun((await system.create('cooperative')).id);
    expect(await new RunRepository(system.prisma()).claim(run, workerId, 1)).toMatchObject({ attempt: 1 });
    return run;
  }

  it('takes a cancelled run for lost when its worker has had the time to come back, and no sooner', async () => {
    const run = await runBy('lost');
    await system.cancel(run.jobId);
    expect(await repairs.confirmLost(3_600_000)).toEqual([]);
    expect(await repairs.confirmLost(1)).toEqual([{ jobId: run.jobId, runId: run.runId }]);
  });

  it('leaves a job to its create while that may still be under way', async () => {
    const [id] = await system.insertQueued(1);
    const found = async (ageMs: number) =>
      (await repairs.findDependingOnQueue('', 1000, ageMs, 1)).some(({ jobId }) => jobId === id);
    expect(await found(3_600_000)).toBe(false);
    await eventually('the create is over', () => found(1));
  });

  it('forgets old workers, but not one that owes an answer', async () => {
    await system.pool.query(`INSERT INTO workers (id, seen_at) VALUES
      ('old', now() - interval '2 days'), ('indebted', now() - interval '2 days'), ('young', now() - interval '1 hour')`);
    await runBy('indebted');
    await repairs.forgetOldWorkers();
    const { rows } = await system.pool.query('SELECT id FROM workers ORDER BY id');
    expect(rows).toEqual([{ id: 'indebted' }, { id: 'young' }]);
  });

  it('leaves a cancelled run to its worker as long as that one lives', async () => {
    const run = await runBy('alive');
    await system.cancel(run.jobId);
    const seen = (at: string) =>
      system.pool.query(
        `INSERT INTO workers (id, seen_at) VALUES ('alive', ${at}) ON CONFLICT (id) DO UPDATE SET seen_at = EXCLUDED.seen_at`,
      );
    await seen("now() + interval '1 hour'");
    expect(await repairs.confirmLost(1)).toEqual([]);
    await seen("now() - interval '1 hour'");
    expect(await repairs.confirmLost(1)).toEqual([{ jobId: run.jobId, runId: run.runId }]);
  });

  it('makes one pass at a time', async () => {
    const passes: string[] = [];
    const pass = (name: string, work?: () => Promise<void>) =>
      repairs.exclusively(async () => {
        passes.push(name);
        await work?.();
      }, 60_000);
    await pass('first', () => pass('one more meanwhile'));
    await pass('second');
    expect(passes).toEqual(['first', 'second']);
  });

  it('makes a pass although another process has frozen in one', async () => {
    const frozen = spawn(process.execPath, ['-e', FREEZES, system.settings.DATABASE_URL!], {
      cwd: DIST,
      stdio: ['ignore', 'ignore', 'inherit'],
    });
    try {
      await eventually('it is frozen', () => isFrozen(frozen.pid!));
      await eventually('another pass', async () => {
        let passed = false;
        await repairs.exclusively(() => Promise.resolve(void (passed = true)), 60_000);
        return passed;
      });
    } finally {
      frozen.kill('SIGKILL');
    }
  });

  it('leaves no transaction open when neither its question for the lock nor its end is answered', async () => {
    const proxy = await TcpProxy.start(process.env.TEST_POSTGRES_URL!);
    const settings = { DATABASE_URL: proxy.through(system.settings.DATABASE_URL!), DATABASE_POOL_SIZE: 1 };
    const database = new Database(settings, pino({ level: 'silent' }));
    try {
      const held = proxy.holdAnswer('pg_try_advisory_xact_lock');
      const failed = new RepairRepository(database)
        .exclusively(async () => {}, 60_000)
        .catch((error: unknown) => error);
      const pass = await held;
      expect(await failed).toBeInstanceOf(Error);
      pass();
      await new WorkerRepository(database).reportAlive('after a silence');
      const { rowCount } = await system.pool.query(`SELECT FROM workers WHERE id = 'after a silence'`);
      expect(rowCount).toBe(1);
    } finally {
      await database.$disconnect();
      await proxy.stop();
    }
  });

  it('adds every job that the queue does not know, however many they are', async () => {
    const ids = await system.insertQueued(1010);
    const worker = await system.startWorker({ WORKER_CONCURRENCY: '1' });
    await eventually('the last one is queued', () => system.isQueued(ids.at(-1)!));
    const added = /^scenario_jobs_repairs_total\{repair="added"\} (\d+)$/m;
    await eventually('all are counted', async () => {
      const [, count] = added.exec(await worker.metrics()) ?? [];
      return Number(count) >= ids.length;
    });
  });

  it('of a worker forgets old workers by itself', async () => {
    await system.pool.query(`INSERT INTO workers (id, seen_at) VALUES ('long gone', now() - interval '2 days')`);
    await system.startWorker();
    await eventually('it is forgotten', async () => {
      const { rowCount } = await system.pool.query(`SELECT FROM workers WHERE id = 'long gone'`);
      return rowCount === 0;
    });
  });
});
