import { once } from 'node:events';
import { readdirSync, readlinkSync } from 'node:fs';
import { connect } from 'node:net';
import { eventually } from '../support/eventually';
import { parseAnswer, parseAnswers, RawConnection, rawHttp } from '../support/raw-http';
import { ServiceProcess } from '../support/service-process';
import { TestSystem } from '../support/test-system';

let system: TestSystem;
beforeAll(async () => {
  system = await TestSystem.start({ workers: 1 });
});
afterAll(() => system.stop());

describe('every error is in the envelope', () => {
  it.each([
    ['GET', '/', 404, 'route_not_found'],
    ['GET', '/rest/v1/nothing', 404, 'route_not_found'],
    ['GET', '/rest/v1/scenario-studio/jobs', 405, 'method_not_allowed'],
    ['PUT', '/rest/v1/scenario-studio/jobs/j1o2b3i4d5x6', 405, 'method_not_allowed'],
    ['PATCH', '/rest/v1/scenario-studio/jobs/j1o2b3i4d5x6', 405, 'method_not_allowed'],
    ['POST', '/rest/v1/scenario-studio/jobs/j1o2b3i4d5x6', 405, 'method_not_allowed'],
    ['DELETE', '/livez', 405, 'method_not_allowed'],
    ['POST', '/rest/v1/scenario-studio/jobs/', 404, 'route_not_found'],
    ['DELETE', '/rest/v1/scenario-studio/jobs/', 404, 'route_not_found'],
    ['OPTIONS', '/rest/v1/scenario-studio/jobs', 405, 'method_not_allowed'],
  ])('%s %s: %i %s', async (method, path, status, code) => {
    const response = await fetch(`${system.api.url}${path}`, { method });
    expect({ status: response.status, body: await response.json() }).toMatchObject({
      status,
      body: { error: { code, message: expect.stringContaining(path) } },
    });
    expect(response.headers.get('x-request-id')).toBeTruthy();
  });

  it('says which methods a path has', async () => {
    const { headers } = await fetch(`${system.jobsUrl}/j1o2b3i4d5x6`, { method: 'PUT' });
    expect(headers.get('allow')?.split(', ').sort()).toEqual(['DELETE', 'GET', 'HEAD']);
    const docs = await fetch(`${system.api.url}/docs`, { method: 'POST' });
    expect(docs.headers.get('allow')?.split(', ').sort()).toEqual(['GET', 'HEAD']);
  });

  it.each([
    ['another type', 'text/plain', 'x'],
    ['a type that is none', 'json', 'x'],
    ['bytes that are no text', 'application/json', new Uint8Array([0xff])],
  ])('says nothing of a body to one who has no key, or of what is not there: %s', async (_what, type, body) => {
    const post = (url: string) => fetch(url, { method: 'POST', body, headers: { 'content-type': type } });
    expect((await post(system.jobsUrl)).status).toBe(401);
    expect((await post(`${system.api.url}/nothing`)).status).toBe(404);
    expect((await post(`${system.jobsUrl}/j1o2b3i4d5x6`)).status).toBe(405);
  });

  it.each([
    ['garbage', 'garbage\r\n\r\n', 400, 'malformed_request'],
    ['a method of its own', 'FROBNICATE / HTTP/1.1\r\nHost: x\r\n\r\n', 400, 'malformed_request'],
    ['large headers', `GET / HTTP/1.1\r\nHost: x\r\nX: ${'x'.repeat(20_000)}\r\n\r\n`, 431, 'headers_too_large'],
    [
      'a length and chunks',
      'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n',
      400,
      'malformed_request',
    ],
    [
      'two lengths',
      'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello',
      400,
      'malformed_request',
    ],
    ['no Host', 'GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n', 400, 'malformed_request'],
    ['two Hosts', 'GET /livez HTTP/1.1\r\nHost: x\r\nHost: y\r\nConnection: close\r\n\r\n', 400, 'malformed_request'],
    ['a Host that is none', 'GET /livez HTTP/1.1\r\nHost: a@b\r\nConnection: close\r\n\r\n', 400, 'malformed_request'],
    [
      'a header of the name that every object has',
      'GET /rest/v1/scenario-studio/jobs/x HTTP/1.1\r\nHost: x\r\n__proto__: x\r\nConnection: close\r\n\r\n',
      401,
      'invalid_api_key',
    ],
    [
      'an expectation of its own',
      'GET /none HTTP/1.1\r\nHost: x\r\nExpect: miracles\r\nConnection: close\r\n\r\n',
      404,
      'route_not_found',
    ],
    [
      'a fragment in a whole URL',
      'GET http://x/livez#y HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n',
      400,
      'malformed_request',
    ],
    [
      'a body too large, of one who waits for leave to send it',
      'POST /rest/v1/scenario-studio/jobs HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9000000\r\n\r\n',
      413,
      'body_too_large',
    ],
    ['CONNECT', 'CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n', 400, 'malformed_request'],
    [
      'bytes that no URL has',
      'DELETE /rest/v1/scenario-studio/jobs/caf\u00e9 HTTP/1.1\r\nHost: x\r\n\r\n',
      400,
      'malformed_request',
    ],
    ['a NUL in a header', 'GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n', 400, 'malformed_request'],
  ])('%s', async (_what, bytes, status, code) => {
    const answer = parseAnswer(await rawHttp(system.api.url!, bytes));
    expect(answer).toMatchObject({ status, body: { error: { code } } });
    const [, id] = /x-request-id: (.+)/.exec(answer.headers)!;
    await eventually('it is in the log', () =>
      system.api.logs.some((line) => line.requestId === id && line.status === status),
    );
  });
});

describe('a tunnel that is asked for', () => {
  it('ends nothing when its caller breaks off', async () => {
    for (let times = 0; times < 20; times++) {
      await new Promise<void>((closed) => {
        const { hostname, port } = new URL(system.api.url!);
        const socket = connect(Number(port), hostname, () => socket.write('CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n'));
        socket.once('data', () => socket.resetAndDestroy());
        socket.on('close', () => closed());
      });
    }
    expect((await fetch(`${system.api.url}/livez`)).status).toBe(200);
    expect(system.api.exit).toBeUndefined();
  });
});

describe('a connection that asks for another protocol', () => {
  it('is closed after the answer: no next request can be read on it', async () => {
    const upgrade = 'GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n';
    const next = 'GET /livez HTTP/1.1\r\nHost: x\r\n\r\n';
    const answer = parseAnswer(await rawHttp(system.api.url!, upgrade + next));
    expect(answer).toMatchObject({ status: 404, body: { error: { code: 'route_not_found' } } });
    expect(answer.headers).toContain('connection: close');
  });
});

const cancelOf = (jobId: string, more: string) =>
  `DELETE /rest/v1/scenario-studio/jobs/${jobId} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${system.key}\r\n${more}`;

describe('a caller who will send no more', () => {
  it('gets the answer to what he has sent, and then the connection ends', async () => {
    const { job } = await system.createRunning('cooperative');
    const connection = new RawConnection(system.api.url!);
    connection.send(Buffer.from(cancelOf(job.id, '\r\n')));
    connection.finish();
    await eventually('the connection has ended', () => connection.closed);
    expect(parseAnswer(String(connection.received))).toMatchObject({ status: 200, body: { status: 'cancelled' } });
    await system.untilStopped(job.id);
  });

  it('gets none if he has sent nothing, or not all of it', async () => {
    for (const [sent, status] of [
      ['', undefined],
      ['DELETE /rest/v1/scen', 400],
      [cancelOf('j1o2b3i4d5x6', 'Content-Length: 5\r\n\r\nab'), 400],
    ] as const) {
      const connection = new RawConnection(system.api.url!);
      connection.send(Buffer.from(sent));
      connection.finish();
      await eventually('the connection has ended', () => connection.closed);
      if (status) expect(parseAnswer(String(connection.received))).toMatchObject({ status });
      else expect(connection.received).toHaveLength(0);
    }
  });
});

describe('a header behind two thousand others', () => {
  it('counts like any other', async () => {
    const keys = 'Connection: close\r\nIdempotency-Key: a\r\nIdempotency-Key: b\r\n\r\n';
    const answer = await rawHttp(system.api.url!, cancelOf('j1o2b3i4d5x6', `${'a:\r\n'.repeat(2000)}${keys}`));
    expect(parseAnswer(answer)).toMatchObject({ status: 400, body: { error: { code: 'invalid_idempotency_key' } } });
  });
});

describe('a request that turns out to be malformed', () => {
  it.each(['garbage', 'GET /\x01 HTTP/1.1'])(
    'does not take the answer of the one before it on the same connection: %j',
    async (malformed) => {
      const { job } = await system.createRunning('cooperative');
      const sent = `${cancelOf(job.id, 'X-Request-Id: first\r\n\r\n')}${malformed}\r\n\r\n`;
      const { answers } = parseAnswers(Buffer.from(await rawHttp(system.api.url!, sent)), ['DELETE', '']);
      expect(answers.map(({ status }) => status)).toEqual([200, 400]);
      expect(answers[0]!.headers['x-request-id']).toEqual(['first']);
      expect(answers[1]!.body).not.toContain(job.id);
      await system.untilStopped(job.id);
    },
  );

  it('has no effect', async () => {
    const { job } = await system.createRunning('cooperative');
    const more = 'Content-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n';
    const answer = await rawHttp(system.api.url!, `${cancelOf(job.id, more)}this is no chunk\r\n`);
    expect(parseAnswer(answer)).toMatchObject({ status: 400, body: { error: { code: 'malformed_request' } } });
    expect((await system.get(job.id)).status).toBe('processing');
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.untilStopped(job.id);
  });
});

describe('requests that are sent before the answer to an earlier one', () => {
  it('find what that has done', async () => {
    const methods = ['GET', 'DELETE', 'GET', 'DELETE'];
    for (let times = 0; times < 5; times++) {
      const { job } = await system.createRunning('cooperative');
      const bytes = methods.map(
        (method, index) =>
          `${method} /rest/v1/scenario-studio/jobs/${job.id} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${system.key}\r\n` +
          `Connection: ${index < 3 ? 'keep-alive' : 'close'}\r\n\r\n`,
      );
      const { answers } = parseAnswers(Buffer.from(await rawHttp(system.api.url!, bytes.join(''))), methods);
      const found = answers.map(
        ({ body }) => JSON.parse(body) as { status?: string; error: { message: string } | null },
      );
      expect(found.map(({ status, error }) => status ?? error?.message)).toEqual([
        'processing',
        'cancelled',
        'cancelled',
        "Cannot cancel job in 'cancelled' state",
      ]);
      await system.untilStopped(job.id);
    }
  });
});

describe('however many requests one connection sends at once', () => {
  const requests = (count: number, last: string) =>
    'DELETE /rest/v1/scenario-studio/jobs/j1o2b3i4d5x6 HTTP/1.1\r\nHost: x\r\n\r\n'.repeat(count) +
    `GET /livez HTTP/1.1\r\nHost: x\r\nConnection: ${last}\r\n\r\n`;

  it('answers some dozens, in their order', async () => {
    const methods = [...Array<string>(100).fill('DELETE'), 'GET'];
    const { answers } = parseAnswers(Buffer.from(await rawHttp(system.api.url!, requests(100, 'close'))), methods);
    expect(answers.map(({ status }) => status)).toEqual([...Array<number>(100).fill(401), 200]);
  });

  it('leaves no file open when its caller hangs up', async () => {
    const page = '/docs/swagger-ui-bundle.js';
    const openFiles = () =>
      readdirSync(`/proc/${system.api.pid}/fd`).filter((fd) => {
        try {
          return readlinkSync(`/proc/${system.api.pid}/fd/${fd}`).endsWith('.js');
        } catch {
          return false; // Closed meanwhile.
        }
      });
    const connection = new RawConnection(system.api.url!);
    connection.stopReading();
    connection.send(Buffer.from(`GET ${page} HTTP/1.1\r\nHost: x\r\n\r\n`.repeat(50)));
    await eventually('one is being answered', () => openFiles().length > 0);
    connection.cut();
    await eventually('none is open', () => openFiles().length === 0);
    expect((await fetch(`${system.api.url}${page}`)).status).toBe(200);
  });

  it('keeps nobody else waiting for thousands, and cuts the connection', async () => {
    const cut = rawHttp(system.api.url!, requests(20_000, 'keep-alive'));
    expect((await fetch(`${system.api.url}/livez`)).status).toBe(200);
    const { answers } = parseAnswers(Buffer.from(await cut), []);
    expect(answers.length).toBeLessThan(20_000);
    expect(await system.api.untilLogged('connection cut: too many requests at once')).toMatchObject({ level: 'warn' });
    expect((await fetch(`${system.api.url}/livez`)).status).toBe(200);
  });
});

describe('a connection that is kept', () => {
  it('is kept for longer than a balancer keeps one, and its caller is told', async () => {
    const { headers } = await fetch(`${system.api.url}/livez`);
    expect(headers.get('keep-alive')).toBe('timeout=72');
  });
});

describe('request ids', () => {
  const idOf = async (given?: string) =>
    (
      await fetch(`${system.api.url}/livez`, given === undefined ? {} : { headers: { 'x-request-id': given } })
    ).headers.get('x-request-id');

  it('takes over the one it is given', async () => {
    expect(await idOf('trace-42')).toBe('trace-42');
  });

  it.each([undefined, '', 'with "quotes"', 'x'.repeat(200)])('makes one instead of %p', async (given) => {
    expect(await idOf(given)).toMatch(/^[0-9a-f-]{36}$/);
  });
});

describe('the log', () => {
  it('has one line for each request, with whom it was for and what came of it', async () => {
    const { job } = await system.createRunning('cooperative');
    await system.cancel(job.id, { 'x-request-id': 'r-cancel' });
    await system.cancel(job.id, { 'x-request-id': 'r-again' });
    const log = await system.apiLog();
    const line = (id: string) => log.filter(({ requestId, msg }) => requestId === id && msg === 'request');
    expect(line('r-cancel')).toEqual([
      expect.objectContaining({
        method: 'DELETE',
        route: '/rest/v1/scenario-studio/jobs/:job_id',
        status: 200,
        ms: expect.any(Number),
        jobId: job.id,
        workspaceId: system.workspace.id,
        keyId: system.keyId,
        outcome: 'cancelled',
        from: 'processing',
      }),
    ]);
    expect(line('r-again')).toEqual([
      expect.objectContaining({ status: 400, error: 'job_not_cancellable', from: 'cancelled' }),
    ]);
    await system.untilStopped(job.id);
  });

  it('says of every request for a job which one it was, and whose', async () => {
    const body = { user_email: 'ada@example.com', prompt: 'cooperative', request_id: 'logged' };
    const { id } = (await system.request('POST', '', { body })).body;
    await system.request('POST', '', { body });
    await system.get(id);
    await system.cancel(id);
    await system.cancel(id);
    const lines = [
      { status: 201, outcome: 'created' },
      { status: 200, outcome: 'existing' },
      { status: 200, method: 'GET' },
      { status: 200, outcome: 'cancelled' },
      { status: 400, error: 'job_not_cancellable' },
    ];
    const whose = { workspaceId: system.workspace.id, keyId: system.keyId };
    expect((await system.apiLog()).filter(({ jobId, msg }) => jobId === id && msg === 'request')).toEqual(
      expect.arrayContaining(lines.map((line): unknown => expect.objectContaining({ ...line, ...whose }))),
    );
  });

  it('has no lines about probes, nor any other of a lower level than LOG_LEVEL', async () => {
    const api = await ServiceProcess.start('main.api.js', { ...system.settings, LOG_LEVEL: 'info' });
    for (const path of ['/livez', '/readyz', '/metrics', '/nothing']) await fetch(`${api.url}${path}`);
    await api.stop();
    await api.untilLogged('shut down');
    expect(api.logs.filter(({ msg }) => msg === 'request')).toEqual([expect.objectContaining({ status: 404 })]);
    expect(api.logs.map(({ level }) => level)).not.toContain('debug');
  });

  it('has one for a request whose caller has gone, for what was done is done', async () => {
    const { job } = await system.createRunning('cooperative');
    const locker = await system.pool.connect();
    await locker.query('BEGIN');
    await locker.query('SELECT FROM scenario_jobs WHERE id = $1 FOR UPDATE', [job.id]);
    const { hostname, port } = new URL(system.api.url!);
    const caller = connect(Number(port), hostname);
    // The permission to go on (100 Continue) shows that the request has arrived.
    caller.write(cancelOf(job.id, 'X-Request-Id: r-gone\r\nExpect: 100-continue\r\n\r\n'));
    await once(caller, 'data');
    caller.resetAndDestroy();
    await once(caller, 'close');
    await locker.query('ROLLBACK');
    locker.release();
    await system.untilStopped(job.id);
    const lines = await eventually('its line', async () => {
      const found = (await system.apiLog()).filter(({ requestId, msg }) => requestId === 'r-gone' && msg === 'request');
      return found.length > 0 && found;
    });
    expect(lines).toEqual([expect.objectContaining({ status: 200, outcome: 'cancelled', unread: true })]);
  });

  const headOfCreate = () =>
    `POST /rest/v1/scenario-studio/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${system.key}\r\n`;

  it.each([
    ['breaks off in the middle', 'Transfer-Encoding: chunked\r\n\r\nzz\r\n', 400, 'malformed_request'],
    ['does not arrive in time', 'Content-Length: 100\r\n\r\n{"a"', 408, 'request_timeout'],
  ])('has a request that %s as its caller was told', async (what, rest, status, code) => {
    const id = what.replaceAll(' ', '-');
    const answer = parseAnswer(await rawHttp(system.api.url!, `${headOfCreate()}X-Request-Id: ${id}\r\n${rest}`));
    expect(answer).toMatchObject({ status, body: { error: { code } } });
    expect(answer.headers).toContain(`x-request-id: ${id}`);
    const lines = await eventually('its line', async () => {
      const found = (await system.apiLog()).filter(({ requestId }) => requestId === id);
      return found.length > 0 && found;
    });
    expect(lines).toEqual([expect.objectContaining({ msg: 'request', status, error: code })]);
    expect(lines[0]).not.toHaveProperty('unread');
  });

  it('does not take a caller that breaks off for a Postgres that does', async () => {
    const more = 'Content-Type: application/json\r\nX-Request-Id: r-broken\r\nTransfer-Encoding: chunked\r\n\r\nzz';
    await rawHttp(system.api.url!, `${headOfCreate()}${more}\r\n`);
    expect((await system.apiLog()).map(({ msg }) => msg)).not.toContain('postgres unavailable');
  });

  it('never has what callers send, nor what tasks make', async () => {
    const fields = { context: 'private context', user_email: 'private@example.com' };
    await system.create('quick', fields);
    // Postgres puts the row that it refuses into its error.
    await system.pool.query(
      `ALTER TABLE scenario_jobs ADD CONSTRAINT refuse CHECK (context NOT LIKE 'private%') NOT VALID`,
    );
    await system.pool.query(`ALTER TABLE scenarios ADD CONSTRAINT refuse CHECK (name <> 'Quick scenario') NOT VALID`);
    try {
      const body = JSON.stringify({ prompt: 'quick', ...fields });
      const headers = { 'content-type': 'application/json', 'x-request-id': 'r-refused' };
      expect((await system.request('POST', '', { headers, body })).status).toBe(500);
      const { id } = await system.create('quick');
      await system.workers[0]!.untilLogged('run could not be carried through, will try again', id);
      await system.cancel(id);
    } finally {
      await system.pool.query('ALTER TABLE scenario_jobs DROP CONSTRAINT refuse');
      await system.pool.query('ALTER TABLE scenarios DROP CONSTRAINT refuse');
    }
    const logs = [await system.apiLog(), system.workers[0]!.logs].map((log) => JSON.stringify(log));
    expect(system.api.logs).toContainEqual(
      expect.objectContaining({ msg: 'request', requestId: 'r-refused', level: 'error', status: 500 }),
    );
    for (const log of logs) expect(log).not.toMatch(/private|Quick scenario|persona/);
  });
});

describe('metrics and health', () => {
  const noRunIsInProgress = () =>
    eventually('no run is in progress', async () =>
      (await system.workers[0]!.metrics()).includes('scenario_jobs_runs_in_progress 0'),
    );

  it('both processes publish what they did', async () => {
    const { job } = await system.createRunning('cooperative');
    await system.cancel(job.id);
    await system.untilStopped(job.id);
    await system.workers[0]!.untilLogged('run ended', job.id);
    const [api, worker] = await Promise.all([system.api, system.workers[0]!].map((one) => one.metrics()));
    expect(api).toMatch(/scenario_jobs_cancel_requests_total\{from="processing",outcome="cancelled"\} [1-9]/);
    expect(api).toMatch(/scenario_jobs_doorbells_total\{outcome="heard"\} [1-9]/);
    expect(api).toMatch(/scenario_jobs_finished_total\{status="cancelled"\} [1-9]/);
    expect(api).toMatch(/scenario_jobs_unfinished\{status="queued"\} \d/);
    expect(api).toMatch(/scenario_jobs_stops_unconfirmed 0/);
    expect(api).toMatch(
      /http_request_duration_seconds_count\{method="DELETE",route="\/rest\/v1\/scenario-studio\/jobs\/:job_id",status="200"\} [1-9]/,
    );
    expect(worker).toMatch(/scenario_jobs_cancel_signal_seconds_count\{source="(doorbell|poll)"\} [1-9]/);
    expect(worker).toMatch(/scenario_jobs_cancel_stop_seconds_count\{how="graceful"\} [1-9]/);
    expect(worker).toMatch(/^scenario_jobs_wait_seconds_count [1-9]/m);
    expect(worker).toMatch(/scenario_jobs_run_seconds_count\{outcome="cancelled"\} [1-9]/);
    // Without a result, no result came too late.
    expect(worker).toMatch(/scenario_jobs_late_results_refused_total 0/);
    await noRunIsInProgress();
  });

  it('each cancel is counted by the status that it found and by its outcome', async () => {
    const counts = async () => {
      const text = await system.api.metrics();
      const counted = text.matchAll(/^scenario_jobs_cancel_requests_total\{from="(\w+)",outcome="(\w+)"\} (\d+)$/gm);
      return new Map([...counted].map(([, from, outcome, count]) => [`${from} ${outcome}`, Number(count)]));
    };
    const before = await counts();
    const { job } = await system.createRunning('cooperative');
    const [queued] = await system.insertQueued(1);
    await system.cancel(job.id, { 'idempotency-key': 'once' });
    await system.cancel(job.id, { 'idempotency-key': 'once' });
    await system.cancel(job.id);
    await system.cancel(queued!);
    await system.cancel('j00000000000');
    const more = [...(await counts())].map(([what, count]) => [what, count - (before.get(what) ?? 0)] as const);
    expect(Object.fromEntries(more.filter(([, count]) => count > 0))).toEqual({
      'processing cancelled': 1,
      'cancelled replayed': 1,
      'cancelled not_cancellable': 1,
      'queued cancelled': 1,
      'none not_found': 1,
    });
  });

  it('times are in seconds', async () => {
    const times = async () => [
      await system.api.observed('http_request_duration_seconds'),
      await system.workers[0]!.observed('scenario_jobs_cancel_signal_seconds'),
      await system.workers[0]!.observed('scenario_jobs_cancel_stop_seconds'),
      await system.workers[0]!.observed('scenario_jobs_wait_seconds'),
      await system.workers[0]!.observed('scenario_jobs_run_seconds'),
    ];
    // What earlier tests have begun is not counted any more.
    await noRunIsInProgress();
    const began = performance.now();
    const before = await times();
    const { job } = await system.createRunning('cooperative');
    await system.cancel(job.id);
    await system.untilStopped(job.id);
    await system.workers[0]!.untilLogged('run ended', job.id);
    const after = await times();
    const took = (performance.now() - began) / 1000;
    // None can have taken longer than all of them together. A time wrongly counted in milliseconds would exceed that.
    for (const [index, time] of after.entries()) expect(time - before[index]!).toBeLessThan(took);
  });

  it('the jobs are counted afresh at each scrape', async () => {
    const unconfirmed = async () => /^scenario_jobs_stops_unconfirmed (.*)$/m.exec(await system.api.metrics())?.[1];
    const { job } = await system.createRunning('cooperative');
    // A run that nobody has cancelled is none of them.
    expect(await unconfirmed()).toBe('0');
    await system.cancel(job.id);
    await system.untilStopped(job.id);
    expect(await unconfirmed()).toBe('0');
    const confirm = (stoppedAt: string, how: string | null) =>
      // As if by a worker that does not exist: the real one would confirm the stop again.
      system.pool.query(
        `UPDATE scenario_jobs SET stopped_at = ${stoppedAt}, stopped_how = $2, worker_id = 'nobody' WHERE id = $1`,
        [job.id, how],
      );
    const client = await system.pool.connect();
    try {
      // No job does this by itself: for a moment, the run is not confirmed any more.
      await client.query('ALTER TABLE scenario_jobs DISABLE TRIGGER USER');
      await confirm('NULL', null);
      expect(await unconfirmed()).toBe('1');
      await confirm('now()', 'graceful');
      expect(await unconfirmed()).toBe('0');
    } finally {
      await client.query('ALTER TABLE scenario_jobs ENABLE TRIGGER USER');
      client.release();
    }
  });

  it('what the documentation does not have is not found', async () => {
    const answer = await fetch(`${system.api.url}/docs/LICENSE`);
    expect({ status: answer.status, body: await answer.json() }).toMatchObject({
      status: 404,
      body: { error: { code: 'route_not_found' } },
    });
  });

  it('both processes are ready', async () => {
    for (const url of [system.api.url, system.workers[0]!.url]) {
      const ready = await fetch(`${url}/readyz`);
      expect(await ready.json()).toEqual({ status: 'ok', postgres: 'up', redis: 'up' });
    }
  });

  it.each([
    ['been migrated', 'scenario_jobs RENAME TO not_yet', 'not_yet RENAME TO scenario_jobs'],
    [
      'the newest migration',
      'scenario_jobs RENAME stop_token TO not_yet',
      'scenario_jobs RENAME not_yet TO stop_token',
    ],
  ])('neither is before the database has %s', async (_what, takeAway, giveBack) => {
    await system.pool.query(`ALTER TABLE ${takeAway}`);
    try {
      for (const url of [system.api.url, system.workers[0]!.url]) {
        const ready = await fetch(`${url}/readyz`);
        expect({ status: ready.status, body: await ready.json() }).toMatchObject({
          status: 503,
          body: { error: { code: 'service_unavailable', message: expect.stringContaining('has not been migrated') } },
        });
      }
      expect(await system.request('DELETE', '/j1o2b3i4d5x6')).toMatchObject({ status: 503 });
      // Nobody need ask an api that has just been started.
      const api = await ServiceProcess.start('main.api.js', system.settings);
      expect(await api.untilLogged('server is down')).toMatchObject({ server: 'postgres' });
      await api.stop();
    } finally {
      await system.pool.query(`ALTER TABLE ${giveBack}`);
    }
    expect((await fetch(`${system.api.url}/readyz`)).status).toBe(200);
  });
});
