import { connect } from 'node:net';
import { parseAnswer, rawHttp } from '../support/raw-http';
import { type ErrorBody, type Job, TestSystem } from '../support/test-system';

let system: TestSystem;
beforeAll(async () => {
  system = await TestSystem.start({ workers: 0 });
});
afterAll(() => system.stop());

const good = { user_email: 'ada@example.com', prompt: 'Discovery call' };
const post = (body: unknown, headers: Record<string, string> = {}) =>
  system.request<Job & ErrorBody>('POST', '', { body, headers });
const without = (field: keyof typeof good) =>
  Object.fromEntries(Object.entries(good).filter(([name]) => name !== field));

describe('POST of a job', () => {
  it('creates it, queued', async () => {
    const { status, body } = await post({ ...good, context: '# Notes', request_id: 'r-1' });
    expect(status).toBe(201);
    expect(body).toEqual({
      id: expect.stringMatching(/^[a-z0-9]{12}$/),
      status: 'queued',
      scenario: null,
      error: null,
      created_at: expect.stringMatching(/Z$/),
      started_at: null,
      completed_at: null,
      duration_seconds: null,
      is_new: true,
    });
  });

  it('lets nobody wait for one whose workspace somebody has locked', async () => {
    const other = await system.createWorkspace();
    const { id } = await system.create('quick');
    let waiting: ReturnType<typeof post>[] = [];
    let answered = false;
    await system.lockRow(
      other.workspace.id,
      async () => {
        // More requests than the api has connections.
        waiting = Array.from({ length: 30 }, (_, index) =>
          post({ ...good, request_id: `locked ${index % 20}` }, { authorization: `Bearer ${other.key}` }).finally(
            () => (answered = true),
          ),
        );
        expect((await post(good)).status).toBe(201);
        expect((await system.cancel(id)).status).toBe(200);
        expect(answered).toBe(false);
      },
      'workspaces',
    );
    const statuses = (await Promise.all(waiting)).map(({ status }) => status).sort();
    expect(statuses).toEqual([...Array<number>(10).fill(200), ...Array<number>(20).fill(201)]);
  });

  it('gives up a workspace that stays locked', async () => {
    const other = await system.createWorkspace();
    const headers = { authorization: `Bearer ${other.key}`, 'x-request-id': 'workspace-locked' };
    await system.lockRow(
      other.workspace.id,
      async () => {
        expect(await post(good, headers)).toMatchObject({
          status: 503,
          body: { error: { code: 'service_unavailable' } },
        });
      },
      'workspaces',
    );
    const { requestId } = await system.api.untilLogged('row locked');
    expect(requestId).toBe('workspace-locked');
    expect((await post(good, headers)).status).toBe(201);
  });

  it('gives the queue its id and a priority, and nothing private', async () => {
    const { id } = await system.create('a secret prompt', { user_email: 'secret@example.com', context: 'secret' });
    const keys = `${system.settings.QUEUE_PREFIX}:scenario-jobs`;
    expect(await system.redis.zscore(`${keys}:prioritized`, id)).not.toBeNull();
    expect(JSON.stringify(await system.redis.hgetall(`${keys}:${id}`))).not.toContain('secret');
  });

  it.each([
    ['the longest prompt', { prompt: 'x'.repeat(10_000) }],
    ['the longest prompt of characters beyond the BMP', { prompt: '💣'.repeat(10_000) }],
    ['the longest context', { context: '\u00e9'.repeat(50_000) }],
    [
      'nulls for what is optional',
      { context: null, scenario_slug: null, request_id: null, callback_url: null, callback_headers: null },
    ],
    ['an empty context', { context: '' }],
  ])('accepts %s', async (_what, fields) => {
    expect((await post({ ...good, ...fields })).status).toBe(201);
  });

  it.each([
    ['no email', without('user_email'), 'missing_field', 'user_email is required'],
    ['no prompt', without('prompt'), 'missing_field', 'prompt is required'],
    ['an empty prompt', { ...good, prompt: '' }, 'missing_field', 'prompt is required'],
    ['a null prompt', { ...good, prompt: null }, 'missing_field', 'prompt is required'],
    ['a prompt that is a number', { ...good, prompt: 1 }, 'invalid_field', 'prompt must be a string'],
    ['a prompt that is a list', { ...good, prompt: ['a'] }, 'invalid_field', 'prompt must be a string'],
    ['a bad email', { ...good, user_email: 'ada' }, 'invalid_field', 'user_email must be an email address'],
    [
      'an email of half a character',
      { ...good, user_email: '\udc00' },
      'invalid_field',
      'user_email must be valid Unicode text without NUL characters',
    ],
    ['an email that is an object', { ...good, user_email: {} }, 'invalid_field', 'user_email must be a string'],
    [
      'a long prompt',
      { ...good, prompt: 'x'.repeat(10_001) },
      'prompt_too_long',
      'prompt must be at most 10000 characters',
    ],
    [
      'a long context',
      { ...good, context: 'x'.repeat(50_001) },
      'context_too_long',
      'context must be at most 50000 characters',
    ],
    [
      'a long request_id',
      { ...good, request_id: 'x'.repeat(256) },
      'invalid_field',
      'request_id must be at most 255 characters',
    ],
    ['an empty scenario_slug', { ...good, scenario_slug: '' }, 'invalid_field', 'scenario_slug must not be empty'],
    [
      'a long scenario_slug',
      { ...good, scenario_slug: 'x'.repeat(256) },
      'invalid_field',
      'scenario_slug must be at most 255 characters',
    ],
    ['a context that is an object', { ...good, context: {} }, 'invalid_field', 'context must be a string'],
    [
      'a scenario_slug that is a list',
      { ...good, scenario_slug: [] },
      'invalid_field',
      'scenario_slug must be a string',
    ],
    ['a request_id that is a number', { ...good, request_id: 1 }, 'invalid_field', 'request_id must be a string'],
    ['an empty request_id', { ...good, request_id: '' }, 'invalid_field', 'request_id must not be empty'],
    ['a NUL', { ...good, prompt: 'a\0b' }, 'invalid_field', 'prompt must be valid Unicode text without NUL characters'],
    [
      'a NUL in a slug',
      { ...good, scenario_slug: 'a\0b' },
      'invalid_field',
      'scenario_slug must be valid Unicode text without NUL characters',
    ],
    [
      'a NUL in a context',
      { ...good, context: 'a\0b' },
      'invalid_field',
      'context must be valid Unicode text without NUL characters',
    ],
    [
      'half a surrogate pair',
      '{"user_email":"a@example.com","prompt":"\\ud800"}',
      'invalid_field',
      'prompt must be valid Unicode text without NUL characters',
    ],
    ['an unknown field', { ...good, contxt: 'x' }, 'unknown_field', 'contxt is not a known field'],
    [
      '__proto__',
      '{"user_email":"a@example.com","prompt":"p","__proto__":{"x":1}}',
      'unknown_field',
      '__proto__ is not a known field',
    ],
    ['constructor', { ...good, constructor: 'x' }, 'unknown_field', 'constructor is not a known field'],
    [
      'a callback_url',
      { ...good, callback_url: 'https://example.com' },
      'unsupported_field',
      'callback_url is not supported yet',
    ],
    [
      'callback_headers',
      { ...good, callback_headers: {} },
      'unsupported_field',
      'callback_headers is not supported yet',
    ],
    ['nothing', '', 'missing_field', 'user_email is required'],
    ['a list', [], 'invalid_json', 'Request body must be a JSON object'],
    ['null', 'null', 'invalid_json', 'Request body must be a JSON object'],
    ['a string', '"text"', 'invalid_json', 'Request body must be a JSON object'],
    ['broken JSON', '{"prompt":', 'invalid_json', 'Request body is not valid JSON'],
    [
      'bytes that are no UTF-8',
      Buffer.from('{"prompt":"caf\xe9"}', 'latin1'),
      'invalid_json',
      'Request body is not valid UTF-8',
    ],
    [
      'characters that only vary others',
      { ...good, prompt: 'x\ufe0f'.repeat(5001) },
      'prompt_too_long',
      'prompt must be at most 10000 characters',
    ],
    [
      'a field of a long name',
      { ...good, ['x'.repeat(1000)]: 1 },
      'unknown_field',
      `${'x'.repeat(100)} is not a known field`,
    ],
    [
      'a field whose name is cut in the middle of a character',
      { ...good, [`${'x'.repeat(99)}\u{1f600}`]: 1 },
      'unknown_field',
      `${'x'.repeat(99)} is not a known field`,
    ],
  ])('refuses %s', async (_what, body, code, message) => {
    const answer = await post(body);
    expect({ status: answer.status, body: answer.body }).toEqual({
      status: 400,
      body: { error: { type: 'invalid_request', code, message } },
    });
  });

  it.each([
    'text/plain',
    'application/x-www-form-urlencoded',
    'multipart/form-data; boundary=x',
    'json',
    'application/json; charset=utf-16',
    'application/json; charset=utf-80',
  ])('refuses %s', async (type) => {
    const { status, body } = await post('a=b', { 'content-type': type });
    expect({ status, code: body.error.code }).toEqual({ status: 415, code: 'unsupported_media_type' });
  });

  it.each([
    ['Transfer-Encoding: gzip, chunked', { status: 415, body: { error: { code: 'unsupported_media_type' } } }],
    ['Transfer-Encoding: Chunked', { status: 201, body: { status: 'queued' } }],
    [
      'Transfer-Encoding: chunked\r\nContent-Encoding: br',
      { status: 415, body: { error: { code: 'unsupported_media_type' } } },
    ],
    [
      'Transfer-Encoding: chunked\r\nContent-Type: application/json',
      { status: 415, body: { error: { code: 'unsupported_media_type' } } },
    ],
  ])('knows from the headers whether it can read a body: %j', async (headers, expected) => {
    const body = JSON.stringify(good);
    const head =
      `POST /rest/v1/scenario-studio/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${system.key}\r\n` +
      `Content-Type: application/json\r\n${headers}\r\nConnection: close\r\n\r\n`;
    const answer = await rawHttp(system.api.url!, `${head}${body.length.toString(16)}\r\n${body}\r\n0\r\n\r\n`);
    expect(parseAnswer(answer)).toMatchObject(expected);
  });

  it('says nothing of what is wrong with a body before it knows whose it is', async () => {
    const { status, body } = await post('{"prompt":', { authorization: 'Bearer exec_live_unknown' });
    expect({ status, code: body.error.code }).toEqual({ status: 401, code: 'invalid_api_key' });
  });

  it('refuses values within values, however deep', async () => {
    const prompt = '['.repeat(100_000) + ']'.repeat(100_000);
    const { status, body } = await post(`{"user_email":"ada@example.com","prompt":${prompt}}`);
    expect({ status, error: body.error }).toMatchObject({ status: 400, error: { message: 'prompt must be a string' } });
  });

  it('refuses a body of more than a mebibyte', async () => {
    const { status, body } = await post({ ...good, context: 'x'.repeat(1024 * 1024) });
    expect({ status, code: body.error.code }).toEqual({ status: 413, code: 'body_too_large' });
  });

  it('says so also to one who reads nothing before all is sent', async () => {
    const length = 20 * 1024 * 1024;
    const { hostname, port, pathname } = new URL(system.jobsUrl);
    const socket = connect(Number(port), hostname);
    const head = `POST ${pathname} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${system.key}\r\nContent-Length: ${length}\r\n\r\n`;
    await new Promise<void>((resolve, reject) => {
      socket.write(head + 'x'.repeat(length), (error) => (error ? reject(error) : resolve()));
    });
    const answer = (await socket.setEncoding('utf8').toArray()).join('');
    expect(parseAnswer(answer)).toMatchObject({ status: 413, body: { error: { code: 'body_too_large' } } });
  });
});

describe('POST with a request_id that the workspace has used', () => {
  it('answers 200 with that job, whatever its status and whatever else is asked for', async () => {
    const first = (await post({ ...good, request_id: 'again' })).body;
    await system.cancel(first.id);
    const { status, body } = await post({ ...good, prompt: 'other', scenario_slug: 'unknown', request_id: 'again' });
    expect(status).toBe(200);
    expect(body).toEqual({ ...(await system.get(first.id)), is_new: false });
  });

  it.each([
    ['missing', { request_id: 'ignored' }],
    ['malformed', { user_email: 1, prompt: '', request_id: 'ignored' }],
    ['unknown', { ...good, contxt: 'x', constructor: 'y', request_id: 'ignored' }],
  ])('answers 200 with that job although other fields are %s', async (_what, again) => {
    const first = (await post({ ...good, request_id: 'ignored' })).body;
    const { status, body } = await post(again);
    expect({ status, id: body.id, isNew: body.is_new }).toEqual({ status: 200, id: first.id, isNew: false });
    expect((await post({ ...again, request_id: 'never used' })).status).toBe(400);
  });

  it('creates one job, however many ask at once', async () => {
    const answers = await Promise.all(Array.from({ length: 20 }, () => post({ ...good, request_id: 'at-once' })));
    expect(new Set(answers.map(({ body }) => body.id)).size).toBe(1);
    expect(answers.map(({ status }) => status).sort()).toEqual([...Array<number>(19).fill(200), 201]);
  });

  it('is another job in another workspace', async () => {
    const { body: ours } = await post({ ...good, request_id: 'shared' });
    const { key } = await system.createWorkspace();
    const { status, body } = await post({ ...good, request_id: 'shared' }, { authorization: `Bearer ${key}` });
    expect(status).toBe(201);
    expect(body.id).not.toBe(ours.id);
  });
});

describe('POST with a scenario_slug', () => {
  it('404 when the workspace has no such scenario', async () => {
    const { status, body } = await post({ ...good, scenario_slug: 'no-such' });
    expect({ status, body }).toEqual({
      status: 404,
      body: { error: { type: 'not_found', code: 'scenario_not_found', message: 'Scenario not found: no-such' } },
    });
  });

  it('201 when it has, and 404 for another workspace', async () => {
    await system.startWorker();
    const { id } = await system.create('quick');
    const slug = (await system.untilStatus(id, 'completed')).scenario!.url.split('/').at(-1);
    expect((await post({ ...good, prompt: 'quick', scenario_slug: slug })).status).toBe(201);
    const { key } = await system.createWorkspace();
    expect((await post({ ...good, scenario_slug: slug }, { authorization: `Bearer ${key}` })).status).toBe(404);
  });
});
