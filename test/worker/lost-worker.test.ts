import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm, symlink, unlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { RUN_ID_VARIABLE } from '../../src/modules/scenario-jobs/worker/running-processes';
import { toLine } from '../../src/modules/scenario-jobs/worker/task-messages';
import { eventually } from '../support/eventually';
import { clockAheadBy, startsItsOwnWith } from '../support/node-options';
import { DIST } from '../support/service-process';
import { groupIsAlive, IMPATIENT, isAlive, isFrozen, SOON_LOST, TestSystem, ZOO } from '../support/test-system';

const SOON = { ...IMPATIENT, ...SOON_LOST, LOCK_MS: '1000' };

describe('when a worker is lost', () => {
  let system: TestSystem;
  beforeEach(async () => {
    system = await TestSystem.start({ settings: { ...SOON, WORKER_CONCURRENCY: '1' } });
  });
  afterEach(() => system.stop());

  it.each(['cooperative', 'spin', 'stubbornSpin'])(
    'killed: its %s task dies with it, and the job runs elsewhere',
    async (species) => {
      const { job, pid } = await system.createRunning(species);
      system.workers[0]!.signal('SIGKILL');
      await eventually('the task is dead', async () => !(await groupIsAlive(pid)));
      await system.startWorker();
      const again = await eventually('the job runs again', async () => {
        const row = await system.row(job.id);
        return row.attempt === 2 && row;
      });
      expect(again.status).toBe('processing');
      await system.cancel(job.id);
      await system.untilStopped(job.id);
    },
  );

  it('killed while it stops a cancelled task: worker_lost is recorded', async () => {
    const { job, pid } = await system.createRunning('stubborn');
    system.workers[0]!.signal('SIGSTOP');
    expect((await system.cancel(job.id)).status).toBe(200);
    system.workers[0]!.signal('SIGKILL');
    await eventually('the task is dead', async () => !(await groupIsAlive(pid)));
    const worker = await system.startWorker();
    expect(await system.untilStopped(job.id)).toMatchObject({ status: 'cancelled', stopped_how: 'worker_lost' });
    expect(await worker.untilLogged('reconciler repaired a job', job.id)).toMatchObject({ repair: 'worker_lost' });
    expect(await worker.metrics()).toMatch(/^scenario_jobs_repairs_total\{repair="worker_lost"\} 1$/m);
  });

  it('frozen: its cancelled task, which never yields, is dead before the worker thaws', async () => {
    const { job, pid } = await system.createRunning('spin');
    system.workers[0]!.signal('SIGSTOP');
    expect((await system.cancel(job.id)).status).toBe(200);
    await eventually('the task is dead', async () => !(await groupIsAlive(pid)));
    expect(system.workers[0]!.exit).toBeUndefined();
    system.workers[0]!.signal('SIGCONT');
    expect(await system.untilStopped(job.id)).toMatchObject({ status: 'cancelled', stopped_how: 'killed' });
  });

  it('frozen for longer than its lock: the job runs elsewhere, and what the first worker has counts for nothing', async () => {
    const { job, finish } = await system.createPatient();
    system.workers[0]!.signal('SIGSTOP');
    const second = await system.startWorker();
    await eventually('the second worker has it', () => second.logged('run began', job.id));
    const { worker_id: owner } = await system.row(job.id);
    system.workers[0]!.signal('SIGCONT');
    await finish();
    await system.untilStatus(job.id, 'completed');
    await eventually('the first run has ended', () => system.workers[0]!.logged('run ended', job.id));
    expect(system.workers[0]!.logged('run ended', job.id)).toMatchObject({ outcome: 'superseded' });
    expect((await system.row(job.id)).worker_id).toBe(owner);
    expect(await system.scenarioCount(job.id)).toBe(1);
  });

  it('again and again: its job fails with WORKER_LOST instead of ending workers for ever', async () => {
    const { job } = await system.createRunning('spin');
    for (let attempt = 1; attempt <= 3; attempt++) {
      await eventually(`attempt ${attempt} runs`, async () => (await system.row(job.id)).attempt === attempt);
      await eventually('its process runs', () => system.workers.at(-1)!.logged('run began', job.id));
      system.workers.at(-1)!.signal('SIGKILL');
      await system.startWorker();
    }
    expect((await system.untilStatus(job.id, 'failed')).error).toEqual({
      code: 'WORKER_LOST',
      message: 'The job was given up: none of its attempts had a result',
    });
  });

  it('killed when a run is over: its watchdog has no part in that any more, and ends nothing for it', async () => {
    const worker = system.workers[0]!;
    const { id } = await system.create('quick');
    const { runId } = await worker.untilLogged('run ended', id);
    const watchdog = await watchdogOf(worker.pid);
    // To a watchdog this process would seem to belong to the run.
    const child = spawn('sleep', ['1000'], { env: { PATH: process.env.PATH, [RUN_ID_VARIABLE]: runId } });
    try {
      worker.signal('SIGKILL');
      await eventually('the watchdog has ended', () => !isAlive(watchdog));
      expect(isAlive(child.pid as number)).toBe(true);
    } finally {
      child.kill('SIGKILL');
    }
  });

  it.each([
    ['gone', 'SIGKILL'],
    ['frozen', 'SIGSTOP'],
  ])('its watchdog is %s: it starts another, which knows the running tasks', async (_what, signal) => {
    const [older] = system.workers;
    await system.createRunning('cooperative');
    const worker = await system.startWorker();
    const { pid } = await system.createRunning('spin');
    const watchdog = await watchdogOf(worker.pid);
    process.kill(watchdog, signal);
    await worker.untilLogged('watchdog ended, starting another');
    // A watchdog that answers is not taken for frozen, however long it lives.
    expect(older!.logged('watchdog ended, starting another')).toBeUndefined();
    await eventually('another watchdog', async () => (await watchdogOf(worker.pid)) !== watchdog);
    worker.signal('SIGKILL');
    await eventually('the task is dead', async () => !(await groupIsAlive(pid)));
  });
});

describe('when a worker is frozen for a moment', () => {
  let system: TestSystem;
  afterEach(() => system.stop());

  it('for less than its lock: its task was ended, and the job is run again by itself', async () => {
    system = await TestSystem.start({ settings: { ...SOON, LOCK_MS: '60000', WORKER_LOST_MS: '60000' } });
    const { job, pid, finish } = await system.createPatient();
    system.workers[0]!.signal('SIGSTOP');
    await eventually('the watchdog ended the task', async () => !(await groupIsAlive(pid)));
    system.workers[0]!.signal('SIGCONT');
    await finish();
    expect((await system.untilStatus(job.id, 'completed', 'failed')).status).toBe('completed');
    expect((await system.row(job.id)).attempt).toBe(2);
    await system.workers[0]!.untilLogged('this worker was frozen, and its watchdog has ended the task', job.id);
  });

  it('while its task ends: a result that was there in time counts, although the time is over', async () => {
    system = await TestSystem.start({ settings: { TASK_TIMEOUT_MS: '6000', WATCHDOG_MS: '60000' } });
    const { job, pid, finish } = await system.createPatient();
    const [worker] = system.workers;
    worker!.signal('SIGSTOP');
    await eventually('it is frozen', () => isFrozen(worker!.pid));
    await finish();
    await eventually('the task has ended', () => !isAlive(pid));
    await sleep(6500);
    worker!.signal('SIGCONT');
    expect(await system.untilStatus(job.id, 'completed', 'failed')).toMatchObject({ status: 'completed' });
  });

  it('while its task stops: what the task has said meanwhile is heard first', async () => {
    system = await TestSystem.start({ settings: { STOP_ACK_MS: '3000' } });
    const worker = system.workers[0]!;
    // The task acknowledges while the worker is frozen, and is still cleaning up when the worker thaws.
    const { job, pid } = await system.createRunning('tidy 6000');
    process.kill(pid, 'SIGSTOP');
    expect((await system.cancel(job.id)).status).toBe(200);
    await worker.untilLogged('stopping: the job was cancelled', job.id);
    worker.signal('SIGSTOP');
    await eventually('it is frozen', () => isFrozen(worker.pid));
    process.kill(pid, 'SIGCONT');
    await sleep(3500);
    worker.signal('SIGCONT');
    expect(await system.untilStopped(job.id)).toMatchObject({ status: 'cancelled', stopped_how: 'graceful' });
  });
});

describe('the process of a task whose worker is gone', () => {
  it('ends by itself, without a watchdog', async () => {
    const task = spawn(process.execPath, [join(DIST, 'main.task.js')], {
      stdio: ['ignore', 'pipe', 'inherit', 'pipe'],
    });
    try {
      const channel = task.stdio[3] as Duplex;
      channel.write(toLine({ kind: 'start', module: ZOO, input: { prompt: 'deaf' } }));
      await once(task.stdout!, 'data');
      channel.destroy();
      await eventually('it has ended', () => task.exitCode !== null);
    } finally {
      task.kill('SIGKILL');
    }
  });
});

describe('a worker that the system gives no process', () => {
  let system: TestSystem;
  let folder: string;
  let node: string;
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'scenario-jobs-node-'));
    node = join(folder, 'node');
    await symlink(process.execPath, node);
    // The worker starts its processes with this program, which can be taken away.
    const NODE_OPTIONS = `${startsItsOwnWith(node)} ${clockAheadBy(50)}`;
    system = await TestSystem.start({
      settings: { ...IMPATIENT, WORKER_CONCURRENCY: '4' },
      worker: () => ({ NODE_OPTIONS }),
    });
  });
  afterEach(async () => {
    await system.stop();
    await rm(folder, { recursive: true });
  });

  const notStarted = (jobId?: string) =>
    system.workers[0]!.logs.filter((line) => line.outcome === 'not_started' && (!jobId || line.jobId === jobId));

  it('tries a job again, as often as it takes, and that is no attempt', async () => {
    await unlink(node);
    const { id } = await system.create('quick');
    await eventually('it has failed more often than a job may', () => notStarted(id).length > 3);
    await symlink(process.execPath, node);
    expect((await system.untilStatus(id, 'completed', 'failed')).status).toBe('completed');
    expect((await system.row(id)).attempt).toBe(1);
    // It has waited once; what it waited for its later runs is no part of that.
    expect(await system.workers[0]!.metrics()).toMatch(/^scenario_jobs_wait_seconds_count 1$/m);
  });

  it('leaves the jobs to a worker that has processes for them, although its clock is ahead', async () => {
    await unlink(node);
    const began = performance.now();
    await system.startWorker({ NODE_OPTIONS: '' });
    for (let times = 0; times < 8; times++) {
      const { id } = await system.create('quick');
      expect((await system.untilStatus(id, 'completed', 'failed')).status).toBe('completed');
    }
    // Each of its four places stays empty for two seconds after each failure.
    const turns = 1 + (performance.now() - began) / 2000;
    expect(notStarted().length).toBeLessThanOrEqual(4 * turns);
  });

  it('goes on trying to start a watchdog', async () => {
    const { pid } = await system.createRunning('spin');
    const watchdog = await watchdogOf(system.workers[0]!.pid);
    await unlink(node);
    process.kill(watchdog, 'SIGKILL');
    const failures = () =>
      system.workers[0]!.logs.filter(({ msg, err }) => msg === 'watchdog ended, starting another' && err);
    await eventually('it has failed twice', () => failures().length >= 2);
    await symlink(process.execPath, node);
    expect(await watchdogOf(system.workers[0]!.pid)).not.toBe(watchdog);
    system.workers[0]!.signal('SIGKILL');
    await eventually('the task is dead', async () => !(await groupIsAlive(pid)));
  });
});

async function watchdogOf(workerPid: number): Promise<number> {
  const { execFileSync } = await import('node:child_process');
  return eventually('the worker has a watchdog', () => {
    const children = execFileSync('ps', ['-o', 'pid=,stat=,args=', '--ppid', String(workerPid)], { encoding: 'utf8' });
    const line = children.split('\n').find((child) => child.includes('main.watchdog') && !/^\s*\d+\s+Z/.test(child));
    return Number(line?.trim().split(/\s+/)[0]);
  });
}
