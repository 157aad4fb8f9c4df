import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { startsItsOwnWith } from '../support/node-options';
import { mute } from '../support/redis-user';
import { groupIsAlive, IMPATIENT, isAlive, NO_POLL, TestSystem } from '../support/test-system';

describe('cancelling a job', () => {
  let system: TestSystem;
  beforeAll(async () => {
    system = await TestSystem.start({
      settings: { ...IMPATIENT, WORKER_CONCURRENCY: '8', SCENARIO_DOMAIN: 'studio.example' },
    });
  });
  afterAll(() => system.stop());

  it('completes a job that nobody cancels, and makes its scenario', async () => {
    const { id } = await system.create('quick');
    const job = await system.untilStatus(id, 'completed');
    expect(job.scenario).toEqual({
      id: expect.stringMatching(/^[a-z0-9]{12}$/),
      name: 'Quick scenario',
      url: expect.stringMatching(
        new RegExp(`^https://${system.workspace.slug}\\.studio\\.example/scenarios/quick-scenario`),
      ),
    });
    expect(job.duration_seconds).toBeCloseTo((Date.parse(job.completed_at!) - Date.parse(job.started_at!)) / 1000, 3);
    expect(await system.scenarioCount(id)).toBe(1);
  });

  // The kind of task, and how its stop must end.
  it.each([
    ['deaf', 'terminated'],
    ['silent', 'terminated'],
    ['spin', 'terminated'],
    ['blocked', 'terminated'],
    ['stubborn', 'killed'],
    ['stubbornSpin', 'killed'],
    ['nodding', 'killed'],
    ['parent', 'terminated'],
    ['daemon', 'terminated'],
  ])('ends a task that is %s: %s', async (species, how) => {
    const { job, pid } = await system.createRunning(species);
    const { status, body } = await system.cancel(job.id);
    expect(status).toBe(200);
    expect(body).toMatchObject({ id: job.id, status: 'cancelled', scenario: null, error: null });
    expect(body.duration_seconds).toBeCloseTo(
      (Date.parse(body.completed_at!) - Date.parse(body.started_at!)) / 1000,
      3,
    );

    const row = await system.untilStopped(job.id);
    expect(row).toMatchObject({ status: 'cancelled', stopped_how: how, cancelled_by: system.keyId });
    expect(await groupIsAlive(pid)).toBe(false);
    expect(await system.scenarioCount(job.id)).toBe(0);
    expect(await system.get(job.id)).toEqual(body);
  });

  it('tells the task why it is stopped', async () => {
    const { job } = await system.createRunning('curious');
    await system.cancel(job.id);
    await system.untilTaskSays(job.id, 'stopped by AbortError: cancelled');
    await system.untilStopped(job.id);
  });

  it.each(['parent', 'daemon'])('ends what a %s started, too', async (species) => {
    const { job, pid } = await system.createRunning(species);
    const child = await system.untilTaskSays(job.id, 'child');
    expect(isAlive(child)).toBe(true);
    await system.cancel(job.id);
    expect(await system.untilStopped(job.id)).toMatchObject({ stopped_how: 'terminated' });
    expect(isAlive(child)).toBe(false);
    expect(await groupIsAlive(pid)).toBe(false);
  });

  it('leaves other jobs on the same worker alone', async () => {
    const bystander = await system.createPatient();
    const { job } = await system.createRunning('stubbornSpin');
    await system.cancel(job.id);
    await system.untilStopped(job.id);
    await bystander.finish();
    expect((await system.untilStatus(bystander.job.id, 'completed', 'failed')).status).toBe('completed');
  });

  it('ends a daemon that a task left behind, although nobody cancelled it', async () => {
    const { id } = await system.create('litterer');
    await system.untilStatus(id, 'completed');
    expect(isAlive(await system.untilTaskSays(id, 'child'))).toBe(false);
  });
});

describe('cancelling a job whose task computes, on a worker that gives much grace', () => {
  let system: TestSystem;
  beforeAll(async () => {
    system = await TestSystem.start({
      settings: { STOP_ACK_MS: '400', STOP_GRACE_MS: '45000', STOP_KILL_MS: '1500' },
    });
  });
  afterAll(() => system.stop());

  it.each(['spin', 'blocked'])('gives none to a task that does not acknowledge: %s', async (species) => {
    const { job } = await system.createRunning(species);
    await system.cancel(job.id);
    expect(await system.untilStopped(job.id)).toMatchObject({ stopped_how: 'terminated' });
  });

  it('gives none to a task that acknowledges only after SIGTERM', async () => {
    const { job } = await system.createRunning('belated');
    await system.cancel(job.id);
    expect(await system.untilStopped(job.id)).toMatchObject({ stopped_how: 'killed' });
  });
});

describe('cancelling a job whose task stops when it is asked', () => {
  let system: TestSystem;
  beforeAll(async () => {
    system = await TestSystem.start();
  });
  afterAll(() => system.stop());

  it.each(['cooperative', 'tidy', 'late'])('ends a task that is %s: graceful', async (species) => {
    const { job, pid } = await system.createRunning(species);
    const { body } = await system.cancel(job.id);
    expect(await system.untilStopped(job.id)).toMatchObject({ status: 'cancelled', stopped_how: 'graceful' });
    expect(await groupIsAlive(pid)).toBe(false);
    expect(await system.scenarioCount(job.id)).toBe(0);
    expect(await system.get(job.id)).toEqual(body);
  });

  it('lets it clean up before it ends', async () => {
    const { job } = await system.createRunning('tidy');
    await system.cancel(job.id);
    expect((await system.untilStopped(job.id)).stopped_how).toBe('graceful');
    await system.untilTaskSays(job.id, 'tidied');
  });

  it('takes down all that it says until its process has ended', async () => {
    const { job } = await system.createRunning('talkative');
    await system.cancel(job.id);
    expect((await system.untilStopped(job.id)).stopped_how).toBe('graceful');
    await system.untilTaskSays(job.id, 'last words');
  });

  it('lets its exit handlers take their time, within its grace', async () => {
    const { job } = await system.createRunning('thorough');
    await system.cancel(job.id);
    expect((await system.untilStopped(job.id)).stopped_how).toBe('graceful');
    await system.untilTaskSays(job.id, 'everything is put away');
  });

  it('runs its exit handlers once, and ends it at once even if one fails', async () => {
    const { job, pid } = await system.createRunning('careful');
    await system.cancel(job.id);
    expect((await system.untilStopped(job.id)).stopped_how).toBe('graceful');
    expect(await groupIsAlive(pid)).toBe(false);
    const said = system.workers[0]!.logs.filter(({ jobId }) => jobId === job.id).map(({ line }) => line);
    expect(said.filter((line) => line === 'the first exit handler has run')).toHaveLength(1);
    expect(said).not.toContain('unhandled');
  });
});

describe('cancelling a job while its process is still starting', () => {
  const never = async (options: NonNullable<Parameters<typeof TestSystem.start>[0]>) => {
    const folder = await mkdtemp(join(tmpdir(), 'scenario-jobs-starting-'));
    const node = join(folder, 'node');
    await writeFile(node, `#!/bin/sh\nsleep 3\nexec '${process.execPath}' "$@"\n`, { mode: 0o755 });
    // The program with which the worker starts its processes.
    const NODE_OPTIONS = startsItsOwnWith(node);
    const SCENARIO_TASK = join(__dirname, '../support/slow-loading-task.mjs');
    const system = await TestSystem.start({
      ...options,
      settings: { ...options.settings, SCENARIO_TASK },
      worker: () => ({ NODE_OPTIONS }),
    });
    try {
      const { id } = await system.create('loads');
      await system.workers[0]!.untilLogged('run began', id);
      expect((await system.cancel(id)).status).toBe(200);
      expect(await system.untilStopped(id)).toMatchObject({ stopped_how: 'graceful' });
      // The first thing that the module does is print.
      expect(system.workers[0]!.logs.filter(({ msg, jobId }) => msg === 'task output' && jobId === id)).toEqual([]);
    } finally {
      await system.stop();
      await rm(folder, { recursive: true });
    }
  };

  it('never loads its module', () => never({}));

  it('nor when its worker has not been told: it asks before it begins what it has claimed long ago', async () => {
    await never({ settings: { ...NO_POLL, WATCHDOG_MS: '1000' }, api: await mute() });
  });
});

describe('cancelling a job while its task is still loading', () => {
  let system: TestSystem;
  let folder: string;
  beforeEach(async () => (folder = await mkdtemp(join(tmpdir(), 'scenario-jobs-loading-'))));
  afterEach(async () => {
    await system.stop();
    await rm(folder, { recursive: true });
  });

  it.each(['waits', 'computes'])('never calls the task, and ends its process: its module %s', async (LOADING) => {
    const LOADED_WHEN = join(folder, 'exists');
    system = await TestSystem.start({
      settings: {
        SCENARIO_TASK: join(__dirname, '../support/slow-loading-task.mjs'),
        TASK_ENV: 'LOADING,LOADED_WHEN',
        LOADING,
        LOADED_WHEN,
      },
    });
    const job = await system.create('loads');
    const pid = await system.untilTaskSays(job.id, 'loading');
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.workers[0]!.untilLogged('stopping: the job was cancelled', job.id);
    await writeFile(LOADED_WHEN, '');
    expect(await system.untilStopped(job.id)).toMatchObject({ status: 'cancelled', stopped_how: 'graceful' });
    expect(await groupIsAlive(pid)).toBe(false);
    expect(system.workers[0]!.logs.map(({ line }) => line)).not.toContain('called');
  });
});
