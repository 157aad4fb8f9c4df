import { spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { join } from 'node:path';
import { whileBehindProxy } from '../support/behind-proxy';
import { eventually } from '../support/eventually';
import { freePort } from '../support/own-redis';
import { DIST, ServiceProcess } from '../support/service-process';
import { TestDatabase } from '../support/test-database';
import { groupIsAlive, IMPATIENT, TestSystem } from '../support/test-system';
import { startWithOwnRedis } from '../support/with-own-redis';

describe('a worker that is told to end', () => {
  let system: TestSystem;
  afterEach(() => system.stop());

  it('lets its runs end, takes no further jobs, and takes back its sign of life', async () => {
    system = await TestSystem.start({ settings: { DRAIN_MS: '20000', WORKER_CONCURRENCY: '1' } });
    const { job, finish } = await system.createPatient();
    const next = await system.create('quick');
    const signs = async () => (await system.pool.query('SELECT FROM workers')).rowCount;
    expect(await signs()).toBe(1);
    system.workers[0]!.signal('SIGTERM');
    await system.workers[0]!.untilLogged('waiting for runs');
    await finish();
    expect(await system.workers[0]!.ended()).toEqual({ code: null, signal: 'SIGTERM' });
    expect(await signs()).toBe(0);
    expect((await system.get(job.id)).status).toBe('completed');
    expect((await system.get(next.id)).status).toBe('queued');
  });

  it.each(['cooperative', 'spin'])(
    'stops a %s run that takes too long: its job runs again elsewhere, and loses no attempt',
    async (species) => {
      system = await TestSystem.start({ settings: { ...IMPATIENT, DRAIN_MS: '100' } });
      const { job, pid } = await system.createRunning(species);
      system.workers[0]!.signal('SIGTERM');
      await system.workers[0]!.ended();
      expect(await groupIsAlive(pid)).toBe(false);
      expect(await system.row(job.id)).toMatchObject({ status: 'queued', attempt: 0, run_id: null });
      await system.startWorker();
      await eventually('it runs again', async () => (await system.row(job.id)).status === 'processing');
      await system.cancel(job.id);
      await system.untilStopped(job.id);
    },
  );

  it('gives a run that it stops its whole grace', async () => {
    system = await TestSystem.start({ settings: { DRAIN_MS: '0', STOP_ACK_MS: '5000', STOP_GRACE_MS: '60000' } });
    // Longer than an acknowledgement may take, plus the time after SIGTERM.
    const { job } = await system.createRunning('tidy 7000');
    const worker = system.workers[0]!;
    worker.signal('SIGTERM');
    await worker.ended();
    await system.untilTaskSays(job.id, 'tidied');
    expect(worker.logged('ending without: stopping runs')).toBeUndefined();
    expect(await system.row(job.id)).toMatchObject({ status: 'queued', attempt: 0 });
  });

  it('stops a job that is cancelled while it drains', async () => {
    system = await TestSystem.start({ settings: { DRAIN_MS: '60000' } });
    const { job } = await system.createRunning('cooperative');
    system.workers[0]!.signal('SIGTERM');
    await system.workers[0]!.untilLogged('waiting for runs');
    await system.cancel(job.id);
    await system.workers[0]!.ended();
    expect(await system.row(job.id)).toMatchObject({ status: 'cancelled', stopped_how: 'graceful' });
  });

  it('ends at once at the second signal, and its task with it', async () => {
    system = await TestSystem.start({ settings: { DRAIN_MS: '3600000' } });
    const { pid } = await system.createRunning('spin');
    system.workers[0]!.signal('SIGTERM');
    await system.workers[0]!.untilLogged('waiting for runs');
    system.workers[0]!.signal('SIGINT');
    expect(await system.workers[0]!.ended()).toEqual({ code: null, signal: 'SIGINT' });
    await eventually('the task is dead', async () => !(await groupIsAlive(pid)));
  });
});

describe('a worker that is told to end when a result is there', () => {
  it('records it, although its process has not ended yet', async () => {
    const system = await TestSystem.start({ settings: { DRAIN_MS: '0' } });
    const { job } = await system.createRunning('lingering');
    await system.untilTaskSays(job.id, 'lingers');
    await system.workers[0]!.stop();
    expect((await system.get(job.id)).status).toBe('completed');
    await system.stop();
  });
});

describe('a process that is told to end while Redis is', () => {
  it.each(['frozen', 'gone'] as const)('%s: ends all the same, and leaves no task', async (fate) => {
    const { redis, system } = await startWithOwnRedis();
    try {
      const { job, pid } = await system.createRunning('cooperative');
      if (fate === 'frozen') redis.pause();
      else await redis.end();
      for (const process of [system.workers[0]!, system.api]) {
        process.signal('SIGTERM');
        expect(await process.ended()).toEqual({ code: null, signal: 'SIGTERM' });
      }
      expect(await groupIsAlive(pid)).toBe(false);
      expect(await system.row(job.id)).toMatchObject({ status: 'queued', run_id: null });
    } finally {
      await system.stop();
      await redis.stop();
    }
  });
});

describe('a worker that is told to end while Postgres is away', () => {
  it('gives up what it cannot record, and leaves no task', async () => {
    // Both at once, because most of the test is waiting.
    await Promise.all((['refuse', 'silence'] as const).map(endWithout));
  });

  async function endWithout(fate: 'refuse' | 'silence') {
    const settings = { DRAIN_MS: '100', BLIND_MS: '3600000', WORKER_LOST_MS: '7200000' };
    await whileBehindProxy('worker', settings, {}, async ({ proxy, system }) => {
      const { pid } = await system.createRunning('cooperative');
      await proxy[fate]();
      const worker = system.workers[0]!;
      worker.signal('SIGTERM');
      expect(await worker.ended()).toEqual({ code: null, signal: 'SIGTERM' });
      expect(await groupIsAlive(pid)).toBe(false);
    });
  }
});

describe('the log of a process that is told to end', () => {
  let system: TestSystem;
  afterEach(() => system.stop());

  it('is written to its last line', async () => {
    system = await TestSystem.start();
    for (const process of [system.api, system.workers[0]!]) {
      await fetch(`${process.url}/livez`, { headers: { 'x-request-id': 'r-last' } });
      process.signal('SIGTERM');
      await process.ended();
      await process.untilLogged('shut down');
      expect(process.logs.map(({ requestId }) => requestId)).toContain('r-last');
    }
  });
});

describe.each(['json', 'pretty'])('a process whose log, %s, finds no room', (format) => {
  const FULL = openSync('/dev/full', 'w');
  afterAll(() => closeSync(FULL));

  it.each([
    ['on the disk', FULL],
    ['because nobody reads it', 'pipe' as const],
  ])('%s, goes on without, and ends when it is told to', async (_, stdout) => {
    const own = await TestDatabase.create();
    const PORT = String(await freePort());
    const api = spawn(process.execPath, [join(DIST, 'main.api.js')], {
      env: {
        PATH: process.env.PATH,
        DATABASE_URL: own.url,
        REDIS_URL: process.env.TEST_REDIS_URL!,
        PORT,
        HOST: '127.0.0.1',
        LOG_FORMAT: format,
      },
      stdio: ['ignore', stdout, 'ignore'],
    });
    const ask = () => fetch(`http://127.0.0.1:${PORT}/rest/v1/scenario-studio/jobs/j1o2b3i4d5x6`);
    try {
      await eventually('it listens', async () => (await ask()).status === 401);
      api.stdout?.destroy();
      // More lines than the process keeps in memory before it tries to write them.
      for (let times = 0; times < 500; times++) expect((await ask()).status).toBe(401);
      api.kill('SIGTERM');
      expect(await eventually('it ends', () => api.signalCode ?? api.exitCode?.toString())).toBe('SIGTERM');
    } finally {
      api.kill('SIGKILL');
      await own.close();
    }
  });
});

describe('a worker that starts', () => {
  let system: TestSystem;
  beforeAll(async () => {
    system = await TestSystem.start({ workers: 0 });
  });
  afterAll(() => system.stop());

  it('shows the metrics that alerts are made of before there is anything to count, as its api does', async () => {
    const worker = await system.startWorker();
    const zero = (metrics: string) => [...metrics.matchAll(/^(scenario_jobs_\w+\{.*"\}) 0$/gm)].map(([, name]) => name);
    const counters = (name: string, label: string, ...values: string[]) =>
      values.map((value) => `scenario_jobs_${name}{${label}="${value}"}`);
    expect(zero(await system.api.metrics())).toEqual(
      expect.arrayContaining([
        ...counters('doorbells_total', 'outcome', 'heard', 'unheard', 'failed'),
        ...counters('finished_total', 'status', 'cancelled'),
      ]),
    );
    expect(zero(await worker.metrics())).toEqual(
      expect.arrayContaining([
        ...counters('cancel_signal_seconds_count', 'source', 'doorbell', 'poll', 'resubscribe'),
        ...counters('finished_total', 'status', 'completed', 'failed'),
        ...counters('run_seconds_count', 'outcome', 'not_started'),
        ...counters(
          'repairs_total',
          'repair',
          'added',
          'requeued',
          'worker_lost',
          'orphan_requeued',
          'orphan_confirmed',
        ),
      ]),
    );
    await worker.stop();
  });

  it('says when it cannot see the processes of the system', async () => {
    const NODE_OPTIONS = `--import="data:text/javascript,import fs from 'node:fs';fs.readlinkSync=()=>{throw new Error()}"`;
    const worker = await system.startWorker({ NODE_OPTIONS });
    await worker.untilLogged(
      '/proc is missing, or that of another PID namespace: what leaves the group of its task lives on',
    );
    await worker.stop();
  });

  it('says when it counts as lost too soon', async () => {
    const settings = { STOP_ACK_MS: '1000', STOP_GRACE_MS: '5000' };
    const patient = await system.startWorker(settings);
    const hasty = await system.startWorker({ ...settings, WORKER_LOST_MS: '70000' });
    await hasty.untilLogged('WORKER_LOST_MS is short: a job may be run again while a lost worker still runs it');
    expect(patient.logs.map(({ msg }) => msg)).not.toContainEqual(expect.stringMatching(/^WORKER_LOST_MS/));
    await Promise.all([patient.stop(), hasty.stop()]);
  });

  it('begins no run when its port is taken', async () => {
    const job = await system.create('quick');
    const WORKER_PORT = new URL(system.api.url as string).port;
    const worker = await ServiceProcess.runToEnd('main.worker.js', { ...system.settings, WORKER_PORT });
    expect(worker.exit).toEqual({ code: 1, signal: null });
    expect(worker.logged('worker could not start')).toBeDefined();
    expect(await system.row(job.id)).toMatchObject({ status: 'queued', attempt: 0 });
  });
});

describe('a process with wrong settings', () => {
  it.each(['main.api.js', 'main.worker.js'])('%s says every fault at once, and does not start', async (entry) => {
    const process = await ServiceProcess.runToEnd(entry, {
      DATABASE_URL: 'mysql://user:secret@host/db',
      CANCEL_POLL_MS: 'often',
    });
    expect(process.exit).toEqual({ code: 78, signal: null });
    expect(process.printed).toEqual([
      'Invalid settings:',
      '  DATABASE_URL must be a postgres:// URL',
      '  REDIS_URL is required',
      '  CANCEL_POLL_MS must be a whole number of milliseconds',
    ]);
  });

  it.each(['/nowhere/task.mjs', __dirname])('a worker whose task is not there does not start: %s', async (path) => {
    const worker = await ServiceProcess.runToEnd('main.worker.js', {
      DATABASE_URL: 'postgres://host/db',
      REDIS_URL: 'redis://host',
      SCENARIO_TASK: path,
    });
    expect(worker.exit).toEqual({ code: 78, signal: null });
    expect(worker.printed).toEqual(['Invalid settings:', '  SCENARIO_TASK must be the path of a file']);
  });
});
