import { setTimeout as sleep } from 'node:timers/promises';
import { hashApiKey, newApiKey } from '../../src/auth/api-key';
import { JobRepository } from '../../src/modules/scenario-jobs/job.repository';
import { eventually } from '../support/eventually';
import { parseAnswer, rawHttp } from '../support/raw-http';
import { type ErrorBody, type Job, TestSystem } from '../support/test-system';

let system: TestSystem;
// No worker, so that a queued job stays queued.
beforeAll(async () => {
  system = await TestSystem.start({ workers: 0 });
});
afterAll(() => system.stop());

describe('DELETE of a queued job', () => {
  it('cancels it and takes it out of the queue', async () => {
    const created = await system.create('quick');
    expect(await system.isQueued(created.id)).toBe(1);
    const { status, body, headers } = await system.cancel(created.id);
    expect(status).toBe(200);
    expect(headers.get('content-type')).toBe('application/json; charset=utf-8');
    expect(body).toEqual({
      id: created.id,
      status: 'cancelled',
      scenario: null,
      error: null,
      created_at: created.created_at,
      started_at: null,
      completed_at: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/),
      duration_seconds: null,
    });
    expect(await system.get(created.id)).toEqual(body);
    await eventually('the queue is without it', async () => (await system.isQueued(created.id)) === 0);
    expect(await system.row(created.id)).toMatchObject({ cancelled_by: system.keyId, stopped_at: null, attempt: 0 });
  });

  it('cancels it once, however often it is asked at once', async () => {
    const { id } = await system.create('quick');
    const answers = await Promise.all(Array.from({ length: 200 }, () => system.cancel(id)));
    expect(answers.filter(({ status }) => status === 200)).toHaveLength(1);
    expect(
      answers.filter(({ status, body }) => status === 400 && body.error.code === 'job_not_cancellable'),
    ).toHaveLength(199);
  });

  it('answers each of many different requests at once for itself', async () => {
    const jobs = await Promise.all(Array.from({ length: 40 }, () => system.create('quick')));
    const stranger = await system.createWorkspace();
    const ended = await system.create('quick');
    await system.cancel(ended.id, { 'idempotency-key': 'earlier' });
    const [cancelled, replayed, refused, foreign, missing] = await Promise.all([
      Promise.all(jobs.map(({ id }, index) => system.cancel(id, { 'idempotency-key': `key ${index}` }))),
      Promise.all(jobs.map(() => system.cancel(ended.id, { 'idempotency-key': 'earlier' }))),
      Promise.all(jobs.map(() => system.cancel(ended.id))),
      Promise.all(jobs.map(() => system.cancel(ended.id, { authorization: `Bearer ${stranger.key}` }))),
      Promise.all(jobs.map(() => system.cancel('j1o2b3i4d5x6'))),
    ]);
    expect(cancelled.map(({ status, body }) => [status, body.id])).toEqual(jobs.map(({ id }) => [200, id]));
    for (const { status, body } of replayed) expect([status, body.id]).toEqual([200, ended.id]);
    for (const { status } of refused) expect(status).toBe(400);
    for (const { status } of [...foreign, ...missing]) expect(status).toBe(404);
    const { rows } = await system.pool.query(
      'SELECT id, cancel_idempotency_key AS key FROM scenario_jobs WHERE id = ANY ($1)',
      [jobs.map(({ id }) => id)],
    );
    expect(new Map(rows.map(({ id, key }: { id: string; key: string }) => [id, key]))).toEqual(
      new Map(jobs.map(({ id }, index) => [id, `key ${index}`])),
    );
  });

  it('lets nobody wait for a row that somebody else has locked', async () => {
    const locked = await system.create('quick');
    const others = await Promise.all(Array.from({ length: 20 }, () => system.create('quick')));
    let waiting: ReturnType<typeof system.cancel>[] = [];
    let answered = false;
    await system.lockRow(locked.id, async () => {
      // More requests than the api has connections.
      waiting = Array.from({ length: 15 }, () => system.cancel(locked.id).finally(() => (answered = true)));
      const answers = await Promise.all(others.map(({ id }) => system.cancel(id)));
      expect(answers.map(({ status }) => status)).toEqual(others.map(() => 200));
      expect(answered).toBe(false);
    });
    expect((await Promise.all(waiting)).map(({ status }) => status).sort()).toEqual([
      200,
      ...Array<number>(14).fill(400),
    ]);
  });

  it('gives up a row that stays locked', async () => {
    const { id } = await system.create('quick');
    await system.lockRow(id, async () => {
      expect(await system.cancel(id)).toMatchObject({ status: 503, body: { error: { code: 'service_unavailable' } } });
    });
    expect(await system.api.untilLogged('row locked', id)).toMatchObject({ level: 'warn' });
    expect(await system.api.metrics()).toMatch(
      /^scenario_jobs_cancel_requests_total\{from="none",outcome="locked"\} [1-9]/m,
    );
    expect((await system.cancel(id)).status).toBe(200);
  });

  it('gives up a statement that takes too long, and Postgres ends it by itself', async () => {
    const { id } = await system.create('quick');
    const cancelling = async () => {
      expect((await system.cancel(id)).status).toBe(503);
      await eventually('no statement of the api is under way', async () => {
        const { rowCount } = await system.pool.query(
          `SELECT FROM pg_stat_activity WHERE application_name = $1 AND state <> 'idle'`,
          [`scenario-jobs ${system.api.pid}`],
        );
        return rowCount === 0;
      });
    };
    // A cancel would pass over a locked row, so the whole table is locked.
    const holder = await system.pool.connect();
    try {
      await holder.query('BEGIN; LOCK TABLE scenario_jobs IN EXCLUSIVE MODE');
      await cancelling();
    } finally {
      await holder.query('ROLLBACK');
      holder.release();
    }
    expect(await system.api.untilLogged('postgres unavailable', id)).toMatchObject({ level: 'warn' });
    expect((await system.cancel(id)).status).toBe(200);
  });

  it.each([
    ['JSON and no body', 'application/json', ''],
    ['JSON that is broken', 'application/json', '{"a":'],
    ['a type that is none', 'json', ''],
    ['text', 'text/plain', 'hello'],
    ['a form', 'application/x-www-form-urlencoded', 'a=b'],
  ])('does not care for a body: %s', async (_what, contentType, body) => {
    const { id } = await system.create('quick');
    expect((await system.request('DELETE', `/${id}`, { body, headers: { 'content-type': contentType } })).status).toBe(
      200,
    );
  });
});

describe('DELETE with an Idempotency-Key', () => {
  it('answers a retry with the 200 of the request that cancelled the job', async () => {
    const { id } = await system.create('quick');
    const first = await system.cancel(id, { 'idempotency-key': 'one' });
    const retry = await system.cancel(id, { 'idempotency-key': 'one' });
    expect([first.status, retry.status]).toEqual([200, 200]);
    expect(retry.body).toEqual(first.body);
    expect((await system.cancel(id, { 'idempotency-key': 'two' })).status).toBe(400);
    expect((await system.cancel(id)).status).toBe(400);
  });

  it('is of its workspace: the same key from another one finds no such job', async () => {
    const { id } = await system.create('quick');
    const stranger = await system.createWorkspace();
    expect((await system.cancel(id, { 'idempotency-key': 'one' })).status).toBe(200);
    const foreign = { authorization: `Bearer ${stranger.key}`, 'idempotency-key': 'one' };
    expect(await system.cancel(id, foreign)).toMatchObject({ status: 404, body: { error: { code: 'job_not_found' } } });
  });

  it('answers every one of many retries at once', async () => {
    const { id } = await system.create('quick');
    const answers = await Promise.all(
      Array.from({ length: 50 }, () => system.cancel(id, { 'idempotency-key': 'same' })),
    );
    expect(new Set(answers.map(({ status, body }) => `${status} ${body.completed_at}`)).size).toBe(1);
  });

  it.each([
    ['empty', ['']],
    ['too long', ['x'.repeat(256)]],
    ['not ASCII', ['caf\u00e9']],
    ['sent twice', ['one', 'one']],
  ])('refuses one that is %s, and cancels nothing', async (_what, keys) => {
    const { id } = await system.create('quick');
    const lines = keys.map((key) => `Idempotency-Key: ${key}\r\n`).join('');
    const request = `DELETE /rest/v1/scenario-studio/jobs/${id} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer ${system.key}\r\n${lines}\r\n`;
    const { status, body } = parseAnswer(await rawHttp(system.api.url!, Buffer.from(request, 'latin1')));
    expect({ status, body }).toMatchObject({ status: 400, body: { error: { code: 'invalid_idempotency_key' } } });
    expect((await system.get(id)).status).toBe('queued');
  });
});

describe('cancels that are decided together', () => {
  it('are not held up by one with a key that does not work for the same job', async () => {
    const jobs = new JobRepository(system.prisma());
    const { id } = await system.create('quick');
    const cancel = (key: string, jobId: string) =>
      jobs.cancel({ keyHash: hashApiKey(key), jobId, idempotencyKey: null });
    const wrong = newApiKey();
    // Two calls start at once; those that come meanwhile share a batch.
    const [, , refused, cancelled] = await Promise.all([
      cancel(wrong, 'aaaaaaaaaaaa'),
      cancel(wrong, 'bbbbbbbbbbbb'),
      cancel(wrong, id),
      cancel(system.key, id),
    ]);
    expect(refused).toBeUndefined();
    expect(cancelled?.job).toMatchObject({ id, status: 'cancelled' });
  });

  it('do not fail with one that the database refuses', async () => {
    const jobs = await Promise.all([1, 2, 3, 4, 5, 6].map(() => system.create('quick')));
    const [refused] = jobs.slice(-1);
    await system.pool.query(
      `ALTER TABLE scenario_jobs ADD CONSTRAINT of_somebody CHECK (id <> '${refused!.id}' OR status <> 'cancelled')`,
    );
    const answers = await Promise.all(jobs.map(({ id }) => system.cancel(id)));
    await system.pool.query('ALTER TABLE scenario_jobs DROP CONSTRAINT of_somebody');
    expect(answers.map(({ status }) => status)).toEqual([200, 200, 200, 200, 200, 500]);
  });

  it('do not wait for one whose key somebody has locked', async () => {
    const other = await system.createWorkspace();
    const headers = { authorization: `Bearer ${other.key}`, 'content-type': 'application/json' };
    const body = JSON.stringify({ user_email: 'ada@example.com', prompt: 'quick' });
    const theirs = await Promise.all(
      [1, 2].map(async () => (await system.request('POST', '', { headers, body })).body.id),
    );
    const { id } = await system.create('quick');
    const { rows } = await system.pool.query<{ id: string }>('SELECT id FROM api_keys WHERE hash = $1', [
      hashApiKey(other.key),
    ]);
    const answered: string[] = [];
    const held: Promise<unknown>[] = [];
    await system.lockRow(
      rows[0]!.id,
      async () => {
        for (const one of theirs) {
          held.push(system.cancel(one, headers).then(({ status }) => answered.push(`theirs ${status}`)));
          await sleep(50);
        }
        answered.push(`ours ${(await system.cancel(id)).status}`);
      },
      'api_keys',
    );
    await Promise.all(held);
    expect(answered).toEqual(['ours 200', 'theirs 200', 'theirs 200']);
  });
});

describe('a job that is not there: 404, in the same words whatever the reason', () => {
  it.each([
    ['unknown', 'j1o2b3i4d5x6', 'j1o2b3i4d5x6'],
    ['upper case', 'J1O2B3I4D5X6', 'J1O2B3I4D5X6'],
    ['too short', 'abc', 'abc'],
    ['very long', 'a'.repeat(5000), 'a'.repeat(5000)],
    ['with a NUL', 'j1o2b3%004d5', 'j1o2b3\u00004d5'],
    ['with a slash', 'a%2Fb', 'a/b'],
    ['SQL', "'%20OR%201=1--", "' OR 1=1--"],
    ['an emoji', '%F0%9F%92%A3', '💣'],
    ['not decodable', '%zz', '%zz'],
    ['not UTF-8', '%ff', '%ff'],
    ['dots', '..%2f..', '../..'],
  ])('%s', async (_what, path, id) => {
    for (const method of ['GET', 'DELETE']) {
      const { status, body } = await system.request<ErrorBody>(method, `/${path}`);
      expect({ status, body }).toEqual({
        status: 404,
        body: { error: { type: 'not_found', code: 'job_not_found', message: `Job not found: ${id}` } },
      });
    }
  });

  it("another workspace's, which it does not change", async () => {
    const { id } = await system.create('quick');
    const { key } = await system.createWorkspace();
    const headers = { authorization: `Bearer ${key}` };
    for (const method of ['GET', 'DELETE']) {
      const { status, body } = await system.request<ErrorBody>(method, `/${id}`, { headers });
      expect({ status, message: body.error.message }).toEqual({ status: 404, message: `Job not found: ${id}` });
    }
    expect((await system.get(id)).status).toBe('queued');
  });
});

describe('a job that has ended', () => {
  beforeAll(async () => {
    await system.startWorker();
  });

  it.each([
    ['completed', 'quick'],
    ['failed', 'throws'],
    ['cancelled', 'cooperative'],
  ])('%s: 400, and nothing changes', async (state, species) => {
    const { id } = await system.create(species);
    if (state === 'cancelled') await system.cancel(id);
    const before = await system.untilStatus(id, state);
    const { status, body } = await system.cancel(id, { 'idempotency-key': 'k' });
    expect({ status, body }).toEqual({
      status: 400,
      body: {
        error: {
          type: 'invalid_request',
          code: 'job_not_cancellable',
          message: `Cannot cancel job in '${state}' state`,
        },
      },
    });
    expect(await system.get(id)).toEqual(before);
  });

  it('a job that waits for its next try is queued, and can be cancelled', async () => {
    const worker = await system.startWorker({ RETRY_BACKOFF_MS: '3600000' });
    await system.workers[0]!.stop();
    const { id } = await system.create('flaky');
    // The delay is at most a minute, however long RETRY_BACKOFF_MS is.
    expect(await worker.untilLogged('run ended', id)).toMatchObject({ outcome: 'retry', delayMs: 60_000 });
    await eventually('it is delayed', () =>
      system.redis.zscore(`${system.settings.QUEUE_PREFIX}:scenario-jobs:delayed`, id),
    );
    expect((await system.get(id)).status).toBe('queued');
    expect((await system.cancel(id)).status).toBe(200);
    await eventually('the queue is without it', async () => (await system.isQueued(id)) === 0);
    expect((await system.row(id)).attempt).toBe(1);
  });
});

describe('while Postgres is away', () => {
  it('answers 503 with Retry-After and changes nothing, is not ready, and recovers by itself', async () => {
    const { id } = await system.create('slow 1000000');
    await system.cutPostgres(async () => {
      for (const method of ['DELETE', 'GET']) {
        const { status, body, headers } = await system.request<ErrorBody>(method, `/${id}`);
        expect({ status, type: body.error.type, code: body.error.code }).toEqual({
          status: 503,
          type: 'service_unavailable',
          code: 'service_unavailable',
        });
        expect(headers.get('retry-after')).toBe('2');
      }
      const ready = await fetch(`${system.api.url}/readyz`);
      expect(ready.status).toBe(503);
      expect(await ready.json()).toMatchObject({
        status: 'unavailable',
        postgres: 'down',
        redis: 'up',
        error: { code: 'service_unavailable' },
      });
      const metrics = await fetch(`${system.api.url}/metrics`);
      expect(metrics.status).toBe(200);
      // Not zero while nobody knows the number.
      expect(await metrics.text()).not.toMatch(/^scenario_jobs_(stops_unconfirmed|unfinished)[ {]/m);
      // Nothing else would show why a process gets no requests.
      expect(await system.api.untilLogged('server is down')).toMatchObject({ server: 'postgres', level: 'warn' });
      expect((await fetch(`${system.api.url}/livez`)).status).toBe(200);
    });
    const { body } = await eventually('it answers again', async () => {
      const answer = await system.request<Job>('GET', `/${id}`);
      return answer.status === 200 && answer;
    });
    expect(body.status).not.toBe('cancelled');
    expect((await system.cancel(id)).status).toBe(200);
  });
});
