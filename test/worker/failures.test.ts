import { join } from 'node:path';
import { parseFromTask } from '../../src/modules/scenario-jobs/worker/task-messages';
import { eventually } from '../support/eventually';
import { groupIsAlive, IMPATIENT, isAlive, TestSystem } from '../support/test-system';

it('nothing that a task sends beside its error and the details reaches the log', () => {
  const error = { code: 'A', message: 'b', retryable: false };
  const threw = { kind: 'threw', error, detail: 'where it was thrown' };
  const line = JSON.stringify({ ...threw, error: { ...error, more: 'x'.repeat(100) }, more: 'y' });
  expect(parseFromTask(line)).toEqual(threw);
  const long = parseFromTask(JSON.stringify({ ...threw, detail: 'z'.repeat(100_000) }));
  expect(JSON.stringify(long).length).toBeLessThan(20_000);
});

describe('a task that goes wrong', () => {
  let system: TestSystem;
  beforeAll(async () => {
    system = await TestSystem.start({
      settings: { WORKER_CONCURRENCY: '4', TASK_MEMORY_MB: '64', TASK_ENV: 'ALLOWED', ALLOWED: 'yes', OTHER: 'no' },
    });
  });
  afterAll(() => system.stop());

  const noName = 'The result of the task has no name of 1 to 255 characters, not all of them blank';
  const unable = 'Unable to generate scenario from the provided prompt';
  it.each([
    ['exitEarly', 'TASK_NO_RESULT', 'The task ended without a result'],
    ['nothing', 'TASK_NO_RESULT', 'The task ended without a result'],
    ['exitBadly', 'TASK_CRASHED', 'The task ended with exit code 3'],
    ['complainer', 'TASK_CRASHED', 'The task ended with exit code 3'],
    ['crash', 'TASK_CRASHED', 'The task ended with exit code 1'],
    ['killItself', 'TASK_CRASHED', 'The task was ended by SIGKILL'],
    ['memory', 'TASK_OUT_OF_MEMORY', 'The task used more than 64 MB of memory'],
    ['throws', 'GENERATION_ERROR', unable],
    ['throwsString', 'GENERATION_ERROR', unable],
    ['throwsNothing', 'GENERATION_ERROR', unable],
    ['mine', 'GENERATION_ERROR', unable],
    ['mirrors', 'GENERATION_ERROR', unable],
    ['noSuchSpecies', 'GENERATION_ERROR', unable],
    ['policy', 'CONTENT_POLICY_VIOLATION', 'The prompt is not allowed'],
    ['wordy', 'CONTENT_POLICY_VIOLATION', 'x'.repeat(1000)],
    ['badCode', 'GENERATION_ERROR', 'The prompt is not allowed'],
    ['unstorable', 'CONTENT_POLICY_VIOLATION', 'Not \ufffd allowed'],
    ['nameless', 'RESULT_INVALID', noName],
    ['named 256', 'RESULT_INVALID', noName],
    ['blankName', 'RESULT_INVALID', noName],
    ['list', 'RESULT_INVALID', 'The result of the task is not an object'],
    ['nul', 'RESULT_INVALID', 'The result of the task has text that is not valid Unicode'],
    ['nulKey', 'RESULT_INVALID', 'The result of the task has text that is not valid Unicode'],
    ['bigint', 'RESULT_NOT_SERIALISABLE', 'The result of the task cannot be written as JSON'],
    ['circular', 'RESULT_NOT_SERIALISABLE', 'The result of the task cannot be written as JSON'],
    ['forger', 'RESULT_INVALID', 'The result of the task is not JSON, or nested too deeply'],
    ['tooLarge', 'RESULT_TOO_LARGE', 'The result of the task is larger than 1 MiB'],
  ])('%s: its job fails with %s', async (species, code, message) => {
    const { id } = await system.create(species);
    const job = await system.untilStatus(id, 'failed', 'completed');
    expect(job).toMatchObject({ status: 'failed', scenario: null, error: { code, message } });
    expect(job.duration_seconds).toBeGreaterThanOrEqual(0);
    expect(await system.scenarioCount(id)).toBe(0);
    await eventually('the queue has dropped it', async () => (await system.isQueued(id)) === 0);
  });

  it.each(['megabyte', 'named 255', 'flood', 'progressFlood', 'chatter', 'boaster', 'unpresentable'])(
    '%s: its job completes all the same',
    async (species) => {
      const { id } = await system.create(species);
      const job = await system.untilStatus(id, 'failed', 'completed');
      expect(job).toMatchObject({ status: 'completed', scenario: { name: expect.not.stringContaining('Forged') } });
    },
  );

  it.each([
    ['flaky', 'GENERATION_ERROR'],
    ['throwsCode ECONNRESET', 'GENERATION_ERROR'],
    ['throwsCode ENOTFOUND', 'GENERATION_ERROR'],
    ['refused', 'GENERATION_ERROR'],
    ['refusedEverywhere', 'GENERATION_ERROR'],
    ['impatient', 'GENERATION_ERROR'],
    ['killItself SIGTERM', 'TASK_CRASHED'],
    ['killItself SIGINT', 'TASK_CRASHED'],
    ['killItself SIGHUP', 'TASK_CRASHED'],
  ])(
    '%s: is tried again while the error may pass, after waits that double, as often as MAX_ATTEMPTS says',
    async (species, code) => {
      const { id } = await system.create(species);
      const job = await system.untilStatus(id, 'failed');
      expect(job.error?.code).toBe(code);
      expect((await system.row(id)).attempt).toBe(3);
      const ends = await eventually('three runs have ended', () => {
        const lines = system.workers[0]!.logs.filter(({ msg, jobId }) => msg === 'run ended' && jobId === id);
        return lines.length === 3 && lines;
      });
      expect(ends.map(({ delayMs }) => delayMs)).toEqual([100, 200, undefined]);
    },
  );

  it('is not tried again if it says so, even of a network error', async () => {
    const { id } = await system.create('hopeless');
    await system.untilStatus(id, 'failed');
    expect((await system.row(id)).attempt).toBe(1);
  });

  it('has its result recorded although somebody whom nobody finds holds its output', async () => {
    const { id } = await system.create('hider');
    const { line } = await eventually('it has said whom it leaves', () =>
      system.workers[0]!.logs.find((one) => one.jobId === id && String(one.line).startsWith('child ')),
    );
    const pid = Number(String(line).split(' ')[1]);
    try {
      await system.untilStatus(id, 'completed');
      expect(isAlive(pid)).toBe(true);
    } finally {
      process.kill(pid, 'SIGKILL');
    }
  });

  it('does not keep others from ending by printing without end', async () => {
    const { job } = await system.createRunning('torrent');
    const limit = (line: { line?: unknown; jobId?: string }) =>
      line.jobId === job.id && String(line.line).startsWith('… the task has printed');
    await eventually('it has printed more than is logged', () => system.workers[0]!.logs.some(limit));
    await system.untilStatus((await system.create('quick')).id, 'completed');
    await system.cancel(job.id);
    await system.untilStopped(job.id);
  });

  it('has what it prints logged with the job id, up to a limit', async () => {
    const { id } = await system.create('flood');
    await system.untilStatus(id, 'completed');
    await system.workers[0]!.untilLogged('run ended', id);
    const lines = system.workers[0]!.logs.filter((line) => line.jobId === id && line.msg === 'task output');
    expect(lines.length).toBeGreaterThan(100);
    expect(lines.length).toBeLessThan(500);
    expect(lines.at(-1)?.line).toMatch(/the rest is dropped/);
  });

  it('has the details of its error in the log and nowhere else', async () => {
    const { id } = await system.create('throws');
    const job = await system.untilStatus(id, 'failed');
    expect(JSON.stringify(job)).not.toContain('secret');
    const { end } = await system.workers[0]!.untilLogged('task ended', id);
    expect(end).toMatchObject({ kind: 'threw', detail: expect.stringMatching(/\/etc\/secret[^]*at .*zoo\.mjs/) });
    expect(await system.workers[0]!.untilLogged('run ended', id)).toMatchObject({ level: 'warn', outcome: 'failed' });
  });

  it.each([
    ['throws', { kind: 'threw', detail: expect.stringContaining('/etc/secret') }],
    ['crash', { kind: 'exited', detail: expect.stringContaining('boom') }],
  ])('has the details of its error in the log although it has printed too much before: %s', async (species, end) => {
    const { id } = await system.create(`loud ${species}`);
    await system.untilStatus(id, 'failed');
    expect((await system.workers[0]!.untilLogged('task ended', id)).end).toMatchObject(end);
  });

  it('has what goes wrong while it stops in the log, but not the stop itself', async () => {
    const [untidy, cooperative] = await Promise.all(['untidy', 'cooperative'].map((one) => system.createRunning(one)));
    for (const { job } of [untidy!, cooperative!]) await system.cancel(job.id);
    const endOf = async ({ job }: { job: { id: string } }) =>
      (await system.workers[0]!.untilLogged('task ended', job.id)).end;
    expect(await endOf(untidy!)).toMatchObject({ detail: expect.stringContaining('left a file behind') });
    expect(await endOf(cooperative!)).not.toHaveProperty('detail');
  });

  it('has what it reports of its progress logged, and nowhere else', async () => {
    const { job } = await system.createRunning('reporter');
    const { progress } = await system.workers[0]!.untilLogged('task progress', job.id);
    expect(progress).toEqual({ step: 'half', done: 1, of: 2 });
    const events = await system.redis.xrange(`${system.settings.QUEUE_PREFIX}:scenario-jobs:events`, '-', '+');
    expect(JSON.stringify(events)).not.toContain('half');
    await system.cancel(job.id);
    await system.untilStopped(job.id);
  });

  it('has what it reports of its progress logged at most once a second', async () => {
    const { id } = await system.create('reporting');
    const job = await system.untilStatus(id, 'completed');
    const reports = system.workers[0]!.logs.filter((line) => line.msg === 'task progress' && line.jobId === id);
    // One report a second, and the last one when the task has ended.
    expect(reports.length).toBeLessThanOrEqual(job.duration_seconds! + 2);
    expect(reports[0]!.progress).toEqual({ done: 0 });
    expect(reports.at(-1)!.progress).toEqual({ done: 99 });
  });

  it('inherits no credentials, only what the settings name', async () => {
    const { id } = await system.create('environment');
    await system.untilStatus(id, 'completed');
    const { rows } = await system.pool.query<{ content: { environment: Record<string, string> } }>(
      'SELECT content FROM scenarios WHERE job_id = $1',
      [id],
    );
    const { environment } = rows[0]!.content;
    expect(environment).toMatchObject({ ALLOWED: 'yes' });
    // Everything that the worker of this test has and a task may have.
    expect(Object.keys(environment).sort()).toEqual(['ALLOWED', 'PATH', 'SCENARIO_RUN_ID']);
    expect(JSON.stringify(environment)).not.toMatch(/postgres:|redis:/);
  });

  it('inherits no connection to Postgres or Redis', async () => {
    const { id } = await system.create('connections');
    await system.untilStatus(id, 'completed');
    const { rows } = await system.pool.query<{ content: { sockets: number; tcp: number } }>(
      'SELECT content FROM scenarios WHERE job_id = $1',
      [id],
    );
    const { sockets, tcp } = rows[0]!.content;
    expect(sockets).toBeGreaterThan(0);
    expect(tcp).toBe(0);
  });

  it('gets the fields of the request under the names of the API', async () => {
    const job = await system.create('input', { context: '# Notes', request_id: 'r-1' });
    await system.untilStatus(job.id, 'completed');
    const { rows } = await system.pool.query<{ content: unknown }>('SELECT content FROM scenarios WHERE job_id = $1', [
      job.id,
    ]);
    expect(rows[0]!.content).toEqual({
      input: {
        job_id: job.id,
        user_email: 'ada@example.com',
        prompt: 'input',
        context: '# Notes',
        scenario_slug: null,
        request_id: 'r-1',
      },
    });
  });
});

describe('a task that goes wrong, on a worker that waits little', () => {
  let system: TestSystem;
  beforeAll(async () => {
    system = await TestSystem.start({ settings: { ...IMPATIENT, WORKER_CONCURRENCY: '2' } });
  });
  afterAll(() => system.stop());

  it.each([
    ['what is no message', 'x'],
    ['progress', '{"kind":"progress"}'],
    ['the same word', '{"kind":"acknowledged"}'],
  ])('does not keep others from ending by sending its worker %s, without end', async (_what, line) => {
    const babbler = await system.createRunning(`babbler ${line}`);
    const bystander = await system.createPatient();
    const deaf = '… the task has sent too much that is no message, and is heard no more';
    await eventually('it is heard no more', () =>
      system.workers[0]!.logs.some((one) => one.jobId === babbler.job.id && one.line === deaf),
    );
    await bystander.finish();
    await system.untilStatus(bystander.job.id, 'completed');
    expect((await system.row(bystander.job.id)).attempt).toBe(1);
    await system.cancel(babbler.job.id);
    await system.untilStopped(babbler.job.id);
  });
});

describe('a task that takes too long', () => {
  let system: TestSystem;
  beforeAll(async () => {
    system = await TestSystem.start({ settings: { ...IMPATIENT, TASK_TIMEOUT_MS: '700' } });
  });
  afterAll(() => system.stop());

  it.each(['cooperative', 'spin'])('%s: is ended, and its job fails with TASK_TIMEOUT', async (species) => {
    const { job, pid } = await system.createRunning(species);
    expect((await system.untilStatus(job.id, 'failed')).error).toEqual({
      code: 'TASK_TIMEOUT',
      message: 'The task took longer than 0.7 seconds',
    });
    expect(isAlive(pid)).toBe(false);
  });
});

describe('another task module', () => {
  let system: TestSystem;
  beforeAll(async () => {
    system = await TestSystem.start({ workers: 0 });
  });
  afterAll(() => system.stop());
  afterEach(() => Promise.all(system.workers.map((worker) => worker.stop())));

  it.each(['../../package.json', '../../bench/statistics.mjs'])(
    'that cannot be loaded leaves its job to a worker that can load its own: %s',
    async (path) => {
      const broken = await system.startWorker({ SCENARIO_TASK: join(__dirname, path) });
      const { id } = await system.create('quick');
      expect(await broken.untilLogged('run ended', id)).toMatchObject({ level: 'warn', outcome: 'not_started' });
      expect(broken.logged('task ended', id)?.end).toMatchObject({ kind: 'not loaded' });
      await system.startWorker();
      await system.untilStatus(id, 'completed');
      expect((await system.row(id)).attempt).toBe(1);
    },
  );

  it('that fails in a way that may pass is not tried again if MAX_ATTEMPTS is 1', async () => {
    await system.startWorker({ MAX_ATTEMPTS: '1' });
    const { id } = await system.create('flaky');
    await system.untilStatus(id, 'failed');
    expect((await system.row(id)).attempt).toBe(1);
  });

  it('that replaces the timers runs all the same', async () => {
    await system.startWorker({ SCENARIO_TASK: join(__dirname, '../support/timeless-task.mjs') });
    const { id } = await system.create('quick');
    await system.untilStatus(id, 'completed');
  });

  it('that runs another program makes a scenario of what that prints, and ends it when it is asked to', async () => {
    const worker = await system.startWorker({ SCENARIO_TASK: join(__dirname, '../../examples/child-program.mjs') });
    const [{ id }, cancelled] = await Promise.all([system.create('one two three'), system.create('one')]);
    const { taskPid } = await worker.untilLogged('run began', cancelled.id);
    await system.cancel(cancelled.id);
    expect(await system.untilStopped(cancelled.id)).toMatchObject({ stopped_how: 'graceful' });
    expect(await groupIsAlive(taskPid as number)).toBe(false);
    await system.untilStatus(id, 'completed');
    const { rows } = await system.pool.query('SELECT content FROM scenarios WHERE job_id = $1', [id]);
    expect(rows).toEqual([{ content: { words: 3 } }]);
  });

  it('that is built in stops when it is asked to', async () => {
    const worker = await system.startWorker({ SCENARIO_TASK: '', SCENARIO_TASK_STEP_MS: '3600000' });
    const { id } = await system.create('Discovery call');
    const { progress } = await worker.untilLogged('task progress', id);
    expect(progress).toEqual({ step: 'name', done: 0, of: 5 });
    await system.cancel(id);
    expect(await system.untilStopped(id)).toMatchObject({ status: 'cancelled', stopped_how: 'graceful' });
  });

  it('that is built in makes a scenario of any prompt, and the same of the same', async () => {
    await system.startWorker({ SCENARIO_TASK: '', SCENARIO_TASK_STEP_MS: '0' });
    const faces = `a${'\u{1f600}'.repeat(120)}`;
    const { id: strange } = await system.create(faces, { context: faces });
    expect((await system.untilStatus(strange, 'completed', 'failed')).scenario?.name).toMatch(/^A\u{1f600}+ with /u);
    const contents = [];
    while (contents.length < 2) {
      const { id } = await system.create('Discovery call about backups', {
        context: 'They use tapes. Budget is small.',
      });
      expect((await system.untilStatus(id, 'completed', 'failed')).scenario?.name).toMatch(
        /^Discovery call about backups with /,
      );
      const { rows } = await system.pool.query<{ content: object }>('SELECT content FROM scenarios WHERE job_id = $1', [
        id,
      ]);
      contents.push(rows[0]!.content);
    }
    expect(Object.keys(contents[0]!).sort()).toEqual(['objectives', 'opening_line', 'persona', 'rubric']);
    expect(contents[0]).toEqual(contents[1]);
  });
});
