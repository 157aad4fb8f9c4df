import { eventually } from '../support/eventually';
import { TcpProxy } from '../support/tcp-proxy';
import { groupIsAlive, IMPATIENT, TestSystem } from '../support/test-system';

describe('the api is killed between its commit and the doorbell', () => {
  let proxy: TcpProxy;
  let system: TestSystem;
  beforeEach(async () => {
    proxy = await TcpProxy.start(process.env.TEST_REDIS_URL!);
    system = await TestSystem.start({ api: ({ REDIS_URL }) => ({ REDIS_URL: proxy.through(REDIS_URL!) }) });
  });
  afterEach(async () => {
    await system.stop();
    await proxy.stop();
  });

  /**
   * Cancels, and kills the api once the row is written but before the queue or the worker has heard of it. The caller
   * may have had its answer by then.
   */
  const cancelAndDie = async (jobId: string) => {
    proxy.silence();
    const answer = system.cancel(jobId, { 'idempotency-key': 'mine' }).then(
      ({ status }) => status,
      () => 'no answer',
    );
    await eventually('the cancel is committed', async () => (await system.row(jobId)).status === 'cancelled');
    await system.api.stop('SIGKILL');
    proxy.clear();
    await system.startApi();
    expect((await system.cancel(jobId, { 'idempotency-key': 'mine' })).status).toBe(200);
    expect([200, 'no answer']).toContain(await answer);
  };

  it('a processing job: its task dies by the poll', async () => {
    const { job, pid } = await system.createRunning('cooperative');
    await cancelAndDie(job.id);
    expect(await system.untilStopped(job.id)).toMatchObject({ stopped_how: 'graceful' });
    expect(await groupIsAlive(pid)).toBe(false);
  });

  it('a queued job: a worker is handed the entry, and does not begin it', async () => {
    await system.workers[0]!.stop();
    const { id } = await system.create('quick');
    await cancelAndDie(id);
    expect(await system.isQueued(id)).toBe(1);
    await system.startWorker();
    await eventually('the entry was delivered and dropped', async () => (await system.isQueued(id)) === 0);
    expect(await system.row(id)).toMatchObject({ status: 'cancelled', started_at: null, attempt: 0 });
  });
});

describe('a worker is killed while it kills', () => {
  let system: TestSystem;
  afterEach(() => system.stop());

  it.each(['stubborn', 'stubbornSpin'])('a task that is %s: the watchdog finishes it', async (species) => {
    // The stop itself would wait an hour between SIGTERM, which the task ignores, and SIGKILL.
    system = await TestSystem.start({
      settings: {
        ...IMPATIENT,
        STOP_KILL_MS: '3600000',
        BLIND_MS: '1500',
        WATCHDOG_MS: '1500',
        WORKER_LOST_MS: '2000',
      },
    });
    const { job, pid } = await system.createRunning(species);
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.workers[0]!.untilLogged('stopping: the job was cancelled', job.id);
    if (species === 'stubborn') await system.untilTaskSays(job.id, 'ignored SIGTERM');
    expect(await groupIsAlive(pid)).toBe(true);
    await system.workers[0]!.stop('SIGKILL');
    await eventually('the task is dead', async () => !(await groupIsAlive(pid)));
    await system.startWorker();
    expect(await system.untilStopped(job.id)).toMatchObject({ status: 'cancelled', stopped_how: 'worker_lost' });
  });
});
