import { randomUUID } from 'node:crypto';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Client } from 'pg';
import { startBehindProxy, whileBehindProxy } from '../support/behind-proxy';
import { eventually } from '../support/eventually';
import { startsItsOwnWith } from '../support/node-options';
import { mute } from '../support/redis-user';
import { OwnPostgres } from '../support/own-postgres';
import { type TcpProxy } from '../support/tcp-proxy';
import { type Answer, groupIsAlive, NO_POLL, TestSystem } from '../support/test-system';

function expectUnavailable({ status, body, headers }: Answer<unknown>) {
  expect({ status, body }).toMatchObject({
    status: 503,
    body: { error: { type: 'service_unavailable', code: 'service_unavailable' } },
  });
  expect(headers.get('retry-after')).toBe('2');
}

/** Returns the answer of `work`, and how long it took. */
async function timed<T>(work: () => Promise<T>): Promise<{ answer: T; seconds: number }> {
  const began = performance.now();
  const answer = await work();
  return { answer, seconds: (performance.now() - began) / 1000 };
}

describe('between the api and Postgres', () => {
  let proxy: TcpProxy;
  let system: TestSystem;
  beforeEach(async () => {
    ({ proxy, system } = await startBehindProxy('api', { DATABASE_POOL_SIZE: '3' }));
  });
  afterEach(async () => {
    await system.stop();
    await proxy.stop();
  });

  it('the connections are cut while nobody uses them: one short line of the log for each, and nothing else', async () => {
    expect((await system.request('GET', '/j1o2b3i4d5x6')).status).toBe(404);
    proxy.cut();
    const { err } = await system.api.untilLogged('postgres connection lost');
    expect(err).toMatchObject({ message: 'Connection terminated unexpectedly' });
    expect(JSON.stringify(err).length).toBeLessThan(1000);
    expect((await system.request('GET', '/j1o2b3i4d5x6')).status).toBe(404);
  });

  it('the connection is cut before the cancel arrives: 503, nothing changed, and the retry cancels', async () => {
    const { job, pid } = await system.createRunning('cooperative');
    const cut = proxy.cutWhenSent(job.id, 'asked');
    const answer = await system.cancel(job.id, { 'idempotency-key': 'one' });
    await cut;
    expectUnavailable(answer);
    expect(await system.row(job.id)).toMatchObject({ status: 'processing' });
    expect((await system.cancel(job.id, { 'idempotency-key': 'one' })).status).toBe(200);
    await system.untilStopped(job.id);
    expect(await groupIsAlive(pid)).toBe(false);
  });

  it('the connection is cut after the cancel was committed: 503, the task dies, and the retry gets its 200', async () => {
    const { job, pid } = await system.createRunning('cooperative');
    const cut = proxy.cutWhenSent(job.id, 'answered');
    const answer = await system.cancel(job.id, { 'idempotency-key': 'one' });
    await cut;
    expectUnavailable(answer);
    // Nobody rang the doorbell: the poll stopped the run.
    const { completed_at: completedAt } = await system.untilStopped(job.id);
    expect(await groupIsAlive(pid)).toBe(false);
    const retry = await system.cancel(job.id, { 'idempotency-key': 'one' });
    expect(retry).toMatchObject({ status: 200, body: { completed_at: completedAt?.toISOString() } });
    expect((await system.cancel(job.id, { 'idempotency-key': 'two' })).status).toBe(400);
  });

  it('the connection is cut after a create was committed: the retry with its request_id gets that job', async () => {
    const requestId = randomUUID();
    const body = { user_email: 'ada@example.com', prompt: 'quick', request_id: requestId };
    const cut = proxy.cutWhenSent('INSERT INTO scenario_jobs', 'answered');
    expectUnavailable(await system.request('POST', '', { body }));
    await cut;
    const retry = await system.request('POST', '', { body });
    expect(retry).toMatchObject({ status: 200, body: { is_new: false } });
    // Nobody queued the job: the reconciler did.
    await system.untilStatus(retry.body.id, 'completed');
    const { rows } = await system.pool.query('SELECT id FROM scenario_jobs WHERE request_id = $1', [requestId]);
    expect(rows).toHaveLength(1);
  });

  it('Postgres is slow: everything is slow, and works', async () => {
    const { job } = await system.createRunning('cooperative');
    proxy.slow(() => 300);
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.untilStopped(job.id);
  });

  it('Postgres goes silent: 503 within the published limit, and the pool recovers by itself', async () => {
    const { job } = await system.createRunning('cooperative');
    // More requests than connections, so that some wait for one.
    await Promise.all([1, 2, 3, 4].map(() => system.get(job.id)));
    proxy.silence();
    const attempts = await Promise.all(Array.from({ length: 6 }, () => timed(() => system.cancel(job.id))));
    for (const { answer, seconds } of attempts) {
      expectUnavailable(answer);
      expect(seconds).toBeLessThan(25);
    }
    expect((await fetch(`${system.api.url}/readyz`)).status).toBe(503);
    expect(await system.row(job.id)).toMatchObject({ status: 'processing' });

    proxy.clear();
    await eventually('the api is ready again', async () => (await fetch(`${system.api.url}/readyz`)).ok);
    await eventually('a cancel gets through', async () => (await system.cancel(job.id)).status === 200);
    await system.untilStopped(job.id);
    // No dead connection is left in the pool: none of many requests runs into one.
    const later = await Promise.all(Array.from({ length: 20 }, () => system.request('GET', `/${job.id}`)));
    expect(later.map(({ status }) => status)).toEqual(Array(20).fill(200));
  });

  it('Postgres refuses connections, then is back: 503 at once, then as ever', async () => {
    const { job } = await system.createRunning('cooperative');
    await proxy.refuse();
    expectUnavailable(await system.cancel(job.id));
    expectUnavailable(await system.request('POST', '', { body: { user_email: 'a@b.cd', prompt: 'quick' } }));
    await proxy.accept();
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.untilStopped(job.id);
  });

  it('Postgres cannot write, for its disk is full: 503, nothing changed; then as ever', async () => {
    const { job } = await system.createRunning('cooperative');
    await system.pool.query(`
      CREATE FUNCTION disk_is_full() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$`);
    await system.pool.query(
      'CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON scenario_jobs EXECUTE FUNCTION disk_is_full()',
    );
    expectUnavailable(await system.cancel(job.id));
    expectUnavailable(await system.request('POST', '', { body: { user_email: 'a@b.cd', prompt: 'quick' } }));
    expect(await system.row(job.id)).toMatchObject({ status: 'processing' });
    await system.pool.query('DROP TRIGGER full_disk ON scenario_jobs');
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.untilStopped(job.id);
  });
});

describe('between a worker and Postgres', () => {
  let proxy: TcpProxy;
  let system: TestSystem;
  beforeEach(async () => {
    ({ proxy, system } = await startBehindProxy('worker'));
  });
  afterEach(async () => {
    await system.stop();
    await proxy.stop();
  });

  it('the answer to a result is lost: it is recorded once, and counts as what it was recorded as', async () => {
    const cut = proxy.cutWhenSent('Quick scenario', 'answered');
    const { id } = await system.create('quick');
    await cut;
    const worker = system.workers[0]!;
    expect(await worker.untilLogged('run ended', id)).toMatchObject({ outcome: 'completed' });
    expect(await system.row(id)).toMatchObject({ status: 'completed', attempt: 1 });
    expect(await system.scenarioCount(id)).toBe(1);
    const metrics = await worker.metrics();
    expect(metrics).toMatch(/^scenario_jobs_finished_total\{status="completed"\} 1$/m);
    expect(metrics).toMatch(/^scenario_jobs_late_results_refused_total 0$/m);
  });

  it('the answer to a failure is lost: that counts as what it was recorded as, too', async () => {
    const cut = proxy.cutWhenSent('The prompt is not allowed', 'answered');
    const { id } = await system.create('policy');
    await cut;
    const worker = system.workers[0]!;
    const code = 'CONTENT_POLICY_VIOLATION';
    expect(await worker.untilLogged('run ended', id)).toMatchObject({ outcome: 'failed', code });
    const metrics = await worker.metrics();
    expect(metrics).toMatch(/^scenario_jobs_finished_total\{status="failed"\} 1$/m);
    expect(metrics).toMatch(/^scenario_jobs_late_results_refused_total 0$/m);
  });

  it('the answer to a claim is lost: the job is begun again, and that was no attempt', async () => {
    const cut = proxy.cutWhenSent('attempt = attempt + 1', 'answered');
    const { id } = await system.create('quick');
    await cut;
    await system.untilStatus(id, 'completed');
    expect(await system.row(id)).toMatchObject({ attempt: 1 });
    expect(await system.workers[0]!.metrics()).toMatch(/^scenario_jobs_repairs_total\{repair="orphan_requeued"\} 1$/m);
  });

  it('the answer to a claim comes after the cancel: its task is not begun', async () => {
    const held = proxy.holdAnswer('attempt = attempt + 1');
    const { id } = await system.create('quick');
    const pass = await held;
    expect((await system.cancel(id)).status).toBe(200);
    const [worker] = system.workers;
    await worker!.untilLogged('stopping: the job was cancelled', id);
    pass();
    expect(await worker!.untilLogged('run ended', id)).toMatchObject({ outcome: 'cancelled', how: 'graceful' });
    expect(worker!.logged('run began', id)).toBeUndefined();
    expect(await system.row(id)).toMatchObject({ status: 'cancelled', stopped_how: 'graceful' });
  });

  it('Postgres goes silent: the task of a cancelled run dies at once, and that is recorded without a restart', async () => {
    const { job, pid } = await system.createRunning('cooperative');
    proxy.silence();
    expect((await system.cancel(job.id)).status).toBe(200);
    await eventually('the task is gone', async () => !(await groupIsAlive(pid)));
    const [worker] = system.workers;
    const stopping = await worker!.untilLogged('stopping: the job was cancelled', job.id);
    expect(stopping).toMatchObject({ source: 'doorbell' });
    await eventually('it is not ready', async () => (await fetch(`${worker!.url}/readyz`)).status === 503);
    expect(await system.row(job.id)).toMatchObject({ status: 'cancelled', stopped_at: null });
    proxy.clear();
    expect((await system.untilStopped(job.id)).stopped_how).toBe('graceful');
  });
});

describe('between a worker and Postgres, when the worker does not know what it has claimed', () => {
  it('the job is cancelled: the stop of what never began is confirmed as graceful', async () => {
    await whileBehindProxy('worker', NO_POLL, {}, async ({ proxy, system }) => {
      const cut = proxy.cutWhenSent('attempt = attempt + 1', 'answered');
      const { id } = await system.create('quick');
      await cut;
      await system.untilStatus(id, 'processing');
      expect((await system.cancel(id)).status).toBe(200);
      expect(await system.untilStopped(id)).toMatchObject({ stopped_how: 'graceful', attempt: 1 });
      const [worker] = system.workers;
      await worker!.untilLogged('confirmed the stop of a run that this worker does not run', id);
      expect(await worker!.metrics()).toMatch(/^scenario_jobs_repairs_total\{repair="orphan_confirmed"\} 1$/m);
    });
  });
});

describe('between a worker and Postgres, when the message to the worker is lost as well', () => {
  it('the task dies when Postgres is back, without a restart', async () => {
    await whileBehindProxy('worker', {}, { api: await mute() }, async ({ proxy, system }) => {
      const { job, pid } = await system.createRunning('cooperative');
      proxy.silence();
      expect((await system.cancel(job.id)).status).toBe(200);
      await system.workers[0]!.untilLogged('could not ask which runs were cancelled');
      expect(await groupIsAlive(pid)).toBe(true);
      proxy.clear();
      await system.untilStopped(job.id);
      expect(await groupIsAlive(pid)).toBe(false);
    });
  });
});

describe('a certificate file that the URL of Postgres names', () => {
  it('is missing for a while: what was read of it before still counts', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'certificate-'));
    const file = join(folder, 'ca.pem');
    await writeFile(file, '');
    const url = (own: string) => `${own}?sslmode=disable&sslrootcert=${file}`;
    const system = await TestSystem.start({ workers: 0, api: (own) => ({ DATABASE_URL: url(own.DATABASE_URL!) }) });
    try {
      await rm(file);
      // So many at once need more connections than there are.
      await Promise.all(Array.from({ length: 30 }, () => system.create('quick')));
      const { err } = await system.api.untilLogged(
        'a certificate file of DATABASE_URL cannot be read; what it held before still counts',
      );
      expect(err).toMatchObject({ code: 'ENOENT' });
    } finally {
      await system.stop();
      await rm(folder, { recursive: true });
    }
  });
});

describe('a worker that starts while Postgres is away', () => {
  it('begins no run before Postgres knows that it lives', async () => {
    await whileBehindProxy('worker', { CANCEL_POLL_MS: '3000' }, { workers: 0 }, async ({ proxy, system }) => {
      const { id } = await system.create('quick');
      await proxy.refuse();
      const worker = await system.startWorker();
      // Until the next poll, nothing tells Postgres of the worker any more.
      await eventually('it has asked in vain', () => worker.logs.some(({ source }) => source === 'resubscribe'));
      await proxy.accept();
      const { started_at: startedAt } = await system.untilStatus(id, 'completed');
      const { rowCount } = await system.pool.query('SELECT FROM workers WHERE started_at <= $1', [startedAt]);
      expect(rowCount).toBe(1);
    });
  });
});

describe('a worker that cannot ask Postgres whether what it has claimed long ago must still run', () => {
  it('does not begin it, and has it run again later', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'scenario-jobs-unasked-'));
    const [node, begin] = [join(folder, 'node'), join(folder, 'begin')];
    // With this program the worker starts its processes; they begin later than WATCHDOG_MS, and when they are told to.
    const script = `sleep 1.1; until [ -e '${begin}' ]; do sleep 0.1; done; exec '${process.execPath}' "$@"`;
    await writeFile(node, `#!/bin/sh\n${script}\n`, { mode: 0o755 });
    const NODE_OPTIONS = startsItsOwnWith(node);
    await whileBehindProxy('worker', { WATCHDOG_MS: '1000', NODE_OPTIONS }, {}, async ({ proxy, system }) => {
      const { id } = await system.create('quick');
      const [worker] = system.workers;
      await worker!.untilLogged('run began', id);
      await proxy.refuse();
      await writeFile(begin, '');
      await worker!.untilLogged('could not ask whether the job must still run', id);
      await proxy.accept();
      expect(await worker!.untilLogged('run ended', id)).toMatchObject({ outcome: 'interrupted' });
      await system.untilStatus(id, 'completed');
      expect((await system.row(id)).attempt).toBe(1);
    });
    await rm(folder, { recursive: true });
  });
});

describe('a worker that must stop its tasks, for it cannot ask Postgres', () => {
  it('keeps the result of a task that has ended before, and records it', async () => {
    await whileBehindProxy('worker', { BLIND_MS: '6000' }, {}, async ({ proxy, system }) => {
      const { job, finish } = await system.createPatient();
      await proxy.refuse();
      await finish();
      const [worker] = system.workers;
      await worker!.untilLogged('task ended', job.id);
      await eventually('it has been blind for too long', () =>
        worker!.logs.some(({ blindMs }) => (blindMs as number) > 6000),
      );
      await proxy.accept();
      await system.untilStatus(job.id, 'completed');
      expect(worker!.logs.filter(({ msg }) => msg === 'run began')).toHaveLength(1);
    });
  });

  it('gives up a result that it cannot record for as long, and has the job run again', async () => {
    await whileBehindProxy('worker', { BLIND_MS: '2000' }, {}, async ({ proxy, system }) => {
      const { job, finish } = await system.createPatient();
      await proxy.refuse();
      await finish();
      const [worker] = system.workers;
      await worker!.untilLogged('run could not be carried through, will try again', job.id);
      await proxy.accept();
      await system.untilStatus(job.id, 'completed');
      expect((await system.row(job.id)).attempt).toBe(2);
    });
  });
});

describe('Postgres itself', () => {
  let postgres: OwnPostgres;
  let system: TestSystem;
  beforeAll(async () => {
    postgres = await OwnPostgres.start(['-c', 'max_connections=40']);
    system = await TestSystem.start({ postgresUrl: postgres.url, settings: { DATABASE_POOL_SIZE: '5' } });
  });
  afterAll(async () => {
    await system.stop();
    await postgres.stop();
  });

  it.each(['fast', 'immediate'] as const)(
    'restarts (%s): what was answered stands, everything goes on',
    async (how) => {
      const cancelled = await system.createRunning('cooperative');
      const going = await system.createRunning('cooperative');
      expect((await system.cancel(cancelled.job.id)).status).toBe(200);
      await postgres.restart(how);
      await eventually('the api answers', async () => (await system.request('GET', `/${going.job.id}`)).status === 200);
      expect(await system.row(cancelled.job.id)).toMatchObject({ status: 'cancelled' });
      expect((await system.cancel(going.job.id)).status).toBe(200);
      await system.untilStopped(cancelled.job.id);
      await system.untilStopped(going.job.id);
      await system.untilStatus((await system.create('quick')).id, 'completed');
    },
  );

  it('refuses the log-in: 503, a result waits, and as ever when it lets us in again', async () => {
    const { job, finish } = await system.createPatient();
    const client = new Client({ connectionString: postgres.url });
    await client.connect();
    try {
      await client.query('ALTER ROLE CURRENT_USER NOLOGIN');
      await client.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ^@ 'scenario-jobs'",
      );
      await eventually('the api is refused', async () => (await system.cancel('j1o2b3i4d5x6')).status === 503);
      expectUnavailable(await system.cancel('j1o2b3i4d5x6'));
      await finish();
      await system.workers[0]!.untilLogged('task ended', job.id);
    } finally {
      await client.query('ALTER ROLE CURRENT_USER LOGIN');
      await client.end();
    }
    await eventually('the job is completed', async () => (await system.get(job.id)).status === 'completed');
    expect(system.workers[0]!.logs.filter(({ msg, jobId }) => msg === 'run began' && jobId === job.id)).toHaveLength(1);
  });

  it('has no connection left: 503, and as ever when there are some again', async () => {
    const { job } = await system.createRunning('cooperative');
    // The service's own connections are cut first, so that it must ask for new ones.
    const hogs: Client[] = [];
    const hog = async () => {
      const client = new Client({ connectionString: postgres.url });
      client.on('error', () => undefined);
      await client.connect();
      hogs.push(client);
    };
    await hog();
    const full = eventually('Postgres is full', async () => {
      await hogs[0]!.query(
        `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'scenario-jobs ${system.api.pid}'`,
      );
      for (;;) {
        try {
          await hog();
        } catch (error) {
          if ((error as { code?: string }).code === '53300') return true;
          throw error;
        }
      }
    });
    await full;
    const answer = await system.cancel(job.id);
    expectUnavailable(answer);
    for (const each of hogs) await each.end();
    await eventually('a cancel gets through', async () => (await system.cancel(job.id)).status === 200);
    await system.untilStopped(job.id);
  });
});
