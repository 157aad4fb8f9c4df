import { setTimeout as sleep } from 'node:timers/promises';
import { eventually } from '../support/eventually';
import { type OwnRedis } from '../support/own-redis';
import { type ServiceProcess } from '../support/service-process';
import { TcpProxy } from '../support/tcp-proxy';
import { groupIsAlive, NO_POLL, TestSystem } from '../support/test-system';
import { startWithOwnRedis } from '../support/with-own-redis';

const UNDELIVERED = 'cancel could not be delivered, and will be noticed later';

const isStopping = (system: TestSystem, jobId: string) =>
  system.workers[0]!.logged('stopping: the job was cancelled', jobId);

const lockOf = (system: TestSystem, jobId: string) => `${system.settings.QUEUE_PREFIX}:scenario-jobs:${jobId}:lock`;

describe('a password that Redis refuses', () => {
  let system: TestSystem;
  beforeAll(async () => {
    system = await TestSystem.start({ workers: 0 });
  });
  afterAll(() => system.stop());

  it.each(['single', 'cluster'])('is in no line of the log: %s', async (REDIS_MODE) => {
    const url = new URL(process.env.TEST_REDIS_URL!);
    url.password = 'not-the-password';
    const worker = await system.startWorker({ REDIS_URL: url.href, REDIS_MODE });
    const { err } = await worker.untilLogged('redis connection lost');
    const { message, lastNodeError } = err as { message: string; lastNodeError?: { message: string } };
    expect(lastNodeError?.message ?? message).toContain('WRONGPASS');
    expect(JSON.stringify([worker.logs, worker.printed])).not.toContain(url.password);
  });
});

describe('between the service and Redis', () => {
  let proxy: TcpProxy;
  let system: TestSystem;
  const start = async (settings: Record<string, string> = {}) => {
    proxy = await TcpProxy.start(process.env.TEST_REDIS_URL!);
    const REDIS_URL = proxy.through(process.env.TEST_REDIS_URL!);
    system = await TestSystem.start({ settings, api: () => ({ REDIS_URL }), worker: () => ({ REDIS_URL }) });
  };
  afterEach(async () => {
    await system.stop();
    await proxy.stop();
  });

  const cancelsAndCreates = async () => {
    const running = await system.createRunning('cooperative');
    expect((await system.cancel(running.job.id)).status).toBe(200);
    await system.untilStopped(running.job.id);
    expect(await groupIsAlive(running.pid)).toBe(false);
  };

  it('everything is slow: it works, only slower', async () => {
    await start();
    proxy.slow(() => 100);
    await cancelsAndCreates();
  });

  it('everything is slower than anybody waits: answered at once all the same, by the rows', async () => {
    await start({ WORKER_CONCURRENCY: '1' });
    const { job: running, pid } = await system.createRunning('cooperative');
    const waiting = await system.create('quick');
    proxy.slow(() => 1500);
    const answers = await Promise.all([running, waiting].map(({ id }) => system.cancel(id)));
    expect(answers.map(({ status }) => status)).toEqual([200, 200]);
    for (const { id } of [running, waiting]) {
      await system.api.untilLogged(UNDELIVERED, id);
      const about = system.api.logs.filter(({ jobId, method }) => jobId === id && method !== 'POST');
      expect(about.map(({ msg }) => msg)).toEqual(['request', UNDELIVERED]);
    }
    await system.untilStopped(running.id);
    expect(await groupIsAlive(pid)).toBe(false);
    const queued = await system.create('quick');
    proxy.clear();
    await system.untilStatus(queued.id, 'completed');
    expect(await system.row(waiting.id)).toMatchObject({ status: 'cancelled', started_at: null });
  });

  it('nothing passes for longer than a lock lasts: a run goes on, and nobody else begins another', async () => {
    await start({ LOCK_MS: '1000' });
    const { job } = await system.createRunning('cooperative');
    await proxy.refuse();
    await eventually('its lock is lost', async () => (await system.redis.exists(lockOf(system, job.id))) === 0);
    await proxy.accept();
    await system.workers[0]!.untilLogged('the lock of a job has expired, so the job is delivered again', job.id);
    await system.workers[0]!.untilLogged('run refused: the job is run by a worker that lives', job.id);
    expect((await system.cancel(job.id)).status).toBe(200);
    expect(await system.untilStopped(job.id)).toMatchObject({ attempt: 1, stopped_how: 'graceful' });
    expect(system.workers[0]!.logs.filter(({ msg }) => msg === 'run began')).toHaveLength(1);
    await eventually('the queue has dropped it', async () => (await system.isQueued(job.id)) === 0);
  });

  it('connections are cut: made again at once, the doorbell as well', async () => {
    await start(NO_POLL);
    const { job } = await system.createRunning('cooperative');
    proxy.cut();
    // While Redis is away the message is lost, and subscribing again asks for what was missed: either way is enough.
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.untilStopped(job.id);
    const next = await system.createRunning('cooperative');
    expect((await system.cancel(next.job.id)).status).toBe(200);
    await system.untilStopped(next.job.id);
  });

  it('connections go silent: the poll is enough, and new connections are made without being told', async () => {
    await start();
    const { job, pid } = await system.createRunning('cooperative');
    proxy.silence();
    expect((await system.cancel(job.id)).status).toBe(200);
    const created = await system.create('quick');
    await system.untilStopped(job.id);
    expect(isStopping(system, job.id)?.source).toBe('poll');
    expect(await groupIsAlive(pid)).toBe(false);

    // The old connections stay silent. Nothing tells the service that a new one would work.
    proxy.clear();
    await system.untilStatus(created.id, 'completed');
    await eventually('the doorbell works again', async () => {
      const again = await system.createRunning('cooperative');
      await system.cancel(again.job.id);
      await system.untilStopped(again.job.id);
      return isStopping(system, again.job.id)?.source === 'doorbell';
    });
  });
});

describe('Redis itself', () => {
  let redis: OwnRedis;
  let system: TestSystem;
  beforeEach(async () => {
    ({ redis, system } = await startWithOwnRedis());
  });
  afterEach(async () => {
    await system.stop();
    await redis.stop();
  });

  it('is away: both processes are ready all the same, and say so, in the log once', async () => {
    const processes = [system.api, system.workers[0]!];
    const linesOf = ({ logs }: ServiceProcess, ...messages: string[]) =>
      logs.filter(({ msg, purpose = 'commands' }) => messages.includes(msg!) && purpose === 'commands').length;
    await redis.end();
    for (const one of processes) {
      const { url } = one;
      // The worker's first query to Postgres can take longer than its health check waits for an answer.
      const ready = await eventually('Redis is down, and nothing else', async () => {
        const response = await fetch(`${url}/readyz`);
        const body = (await response.json()) as Record<string, unknown>;
        return body.postgres === 'up' && body.redis === 'down' && { status: response.status, body };
      });
      expect(ready).toMatchObject({ status: 200, body: { status: 'degraded' } });
      for (let times = 0; times < 3; times++) await fetch(`${url}/readyz`);
      await eventually('it is logged', () => linesOf(one, 'redis connection lost') > 0);
    }
    await redis.launch();
    for (const one of processes) {
      await eventually('Redis is up', async () => (await (await fetch(`${one.url}/readyz`)).text()).includes('"ok"'));
      await one.untilLogged('server is up again');
      await eventually('it is logged', () => linesOf(one, 'redis connection is back') > 0);
      const faults = one.logs.filter(({ msg, server }) => msg === 'server is down' && server === 'redis');
      expect(new Set(faults.map(({ err }) => (err as Error).message)).size).toBe(faults.length);
      expect(linesOf(one, 'redis connection lost', 'redis connection is back')).toBe(2);
    }
  });

  it.each([
    ['its first question', 'info'],
    ['to give it a job', 'evalsha'],
  ])('refuses a worker %s: it asks with patience, and takes jobs as soon as it may', async (_what, command) => {
    await system.workers[0]!.stop();
    await redis.command('acl', 'setuser', 'worker', 'on', '>secret', '~*', '&*', '+@all', `-${command}`);
    const REDIS_URL = redis.url.replace('redis://', 'redis://worker:secret@');
    const worker = await system.startWorker({ REDIS_URL });
    const { id } = await system.create('quick');
    await worker.untilLogged('queue error, will try again');
    // Without its pause the worker would have asked thousands of times in this long.
    await sleep(2000);
    const errors = String(await redis.command('info', 'errorstats'));
    expect(Number(/errorstat_NOPERM:count=(\d+)/.exec(errors)?.[1])).toBeLessThan(100);
    expect((await fetch(`${worker.url}/livez`)).status).toBe(200);
    await redis.command('acl', 'setuser', 'worker', `+${command}`);
    await system.untilStatus(id, 'completed');
  });

  it.each([
    {
      state: 'is a replica, which refuses to write',
      begin: () => system.redis.replicaof('127.0.0.1', 1),
      end: () => system.redis.replicaof('NO', 'ONE'),
    },
    {
      state: 'is out of memory',
      begin: () => system.redis.config('SET', 'maxmemory', '1'),
      end: () => system.redis.config('SET', 'maxmemory', '0'),
    },
    {
      state: 'cannot write to its disk, and refuses to change anything',
      begin: () => redis.failToSave(),
      end: () => redis.saveAgain(),
    },
  ])('$state: creates and cancels are answered, cancelled is cancelled, and later everything runs', async (fault) => {
    const running = await system.createRunning('cooperative');
    await fault.begin();
    const [kept, dropped] = [await system.create('quick'), await system.create('quick')];
    expect((await system.cancel(dropped.id)).status).toBe(200);
    expect((await system.cancel(running.job.id)).status).toBe(200);
    await system.untilStopped(running.job.id);
    expect(await groupIsAlive(running.pid)).toBe(false);
    await fault.end();
    await system.untilStatus(kept.id, 'completed');
    expect(await system.row(dropped.id)).toMatchObject({ status: 'cancelled', started_at: null });
  });
});
