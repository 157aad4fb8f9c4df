import { newApiKey } from '../../src/auth/api-key';
import { eventually } from '../support/eventually';
import { parseAnswer, rawHttp } from '../support/raw-http';
import { type ErrorBody, TestSystem } from '../support/test-system';

let system: TestSystem;
beforeAll(async () => {
  system = await TestSystem.start({ workers: 0 });
});
afterAll(() => system.stop());

const REFUSAL = {
  error: { type: 'authentication_error', code: 'invalid_api_key', message: 'Invalid or inactive API key' },
};
const ask = async (authorization: string | undefined) => {
  const response = await fetch(`${system.jobsUrl}/j1o2b3i4d5x6`, {
    method: 'DELETE',
    headers: authorization === undefined ? {} : { authorization },
  });
  return {
    status: response.status,
    challenge: response.headers.get('www-authenticate'),
    body: (await response.json()) as ErrorBody,
  };
};

/** A key of the workspace that no longer works: `how` is the assignment in SQL that ended it. */
async function endedKey(how: string): Promise<string> {
  const { key, keyId } = await system.createKey(system.workspace.id);
  await system.pool.query(`UPDATE api_keys SET ${how} WHERE id = $1`, [keyId]);
  return key;
}

describe('without a valid key: 401', () => {
  it('missing', async () => {
    expect(await ask(undefined)).toEqual({ status: 401, challenge: 'Bearer realm="scenario-studio"', body: REFUSAL });
  });

  it.each([
    ['empty', () => ''],
    ['no scheme', () => system.key],
    ['another scheme', () => `Basic ${system.key}`],
    ['no key', () => 'Bearer '],
    ['another prefix', () => `Bearer exec_test_${system.key.slice(10)}`],
    ['too short', () => `Bearer ${system.key.slice(0, -1)}`],
    ['too long', () => `Bearer ${system.key}a`],
    ['other characters', () => `Bearer ${system.key.slice(0, -1)}-`],
    ['upper case', () => `Bearer ${system.key.toUpperCase()}`],
    ['two keys', () => `Bearer ${system.key}, Bearer ${system.key}`],
    ['unknown', () => `Bearer ${newApiKey()}`],
  ])('%s', async (_what, header) => {
    expect(await ask(header())).toEqual({
      status: 401,
      challenge: 'Bearer realm="scenario-studio", error="invalid_token"',
      body: REFUSAL,
    });
  });

  it.each([
    ['expired', { expiresAt: new Date(Date.now() - 1000) }],
    ['revoked', { revokedAt: new Date() }],
  ])('%s', async (_what, times) => {
    const { key } = await system.createKey(system.workspace.id, times);
    expect(await ask(`Bearer ${key}`)).toMatchObject({ status: 401, body: REFUSAL });
  });

  it('what is stored of a key, in any form of it', async () => {
    const { rows } = await system.pool.query<{ hash: string }>('SELECT hash FROM api_keys WHERE id = $1', [
      system.keyId,
    ]);
    const { hash } = rows[0]!;
    for (const stolen of [hash, hash.slice(0, 40), Buffer.from(hash, 'hex').toString('base64').slice(0, 40)]) {
      for (const key of [stolen, `exec_live_${stolen}`]) {
        const answer = await system.request('GET', '/j1o2b3i4d5x6', { headers: { authorization: `Bearer ${key}` } });
        expect(answer.status).toBe(401);
      }
    }
  });

  it('sent twice', async () => {
    const line = `Authorization: Bearer ${system.key}\r\n`;
    const request = `GET /rest/v1/scenario-studio/jobs/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n${line}${line}\r\n`;
    expect(parseAnswer(await rawHttp(system.api.url!, request))).toMatchObject({ status: 401, body: REFUSAL });
  });
});

describe('with a valid key', () => {
  it.each(['Bearer', 'bearer', 'BEARER'])('%s is accepted', async (scheme) => {
    expect((await ask(`${scheme} ${system.key}`)).status).toBe(404);
  });

  it('a key that expires later is accepted', async () => {
    const { key } = await system.createKey(system.workspace.id, { expiresAt: new Date(Date.now() + 60_000) });
    expect((await ask(`Bearer ${key}`)).status).toBe(404);
  });

  it('a revoked one stops working at once', async () => {
    const { key, keyId } = await system.createKey(system.workspace.id);
    expect((await ask(`Bearer ${key}`)).status).toBe(404);
    await system.pool.query('UPDATE api_keys SET revoked_at = now() WHERE id = $1', [keyId]);
    expect((await ask(`Bearer ${key}`)).status).toBe(401);
  });

  it('of an inactive workspace: 403, and the log says whose key it was', async () => {
    const { key, keyId, workspace } = await system.createWorkspace();
    await system.pool.query('UPDATE workspaces SET active = false WHERE id = $1', [workspace.id]);
    expect(await ask(`Bearer ${key}`)).toMatchObject({
      status: 403,
      body: { error: { type: 'authorization_error', code: 'workspace_inactive', message: 'Workspace is inactive' } },
    });
    await eventually('the request is logged', () =>
      system.api.logs.find(
        (line) =>
          line.msg === 'request' && line.status === 403 && line.workspaceId === workspace.id && line.keyId === keyId,
      ),
    );
  });
});

describe('a key that does not work cancels nothing, alone or among keys that do', () => {
  it.each([
    ['unknown', 401, () => newApiKey()],
    ['revoked', 401, () => endedKey('revoked_at = now()')],
    ['expired', 401, () => endedKey(`expires_at = now() - interval '1 second'`)],
    ["another workspace's", 404, async () => (await system.createWorkspace()).key],
  ])('%s: %i', async (_what, status, keyOf) => {
    const key = await keyOf();
    const [job, ...others] = await Promise.all(Array.from({ length: 20 }, () => system.create('quick')));
    const withKey = { authorization: `Bearer ${key}` };
    expect((await system.cancel(job!.id, withKey)).status).toBe(status);
    const [refused, ...answers] = await Promise.all([
      system.cancel(job!.id, withKey),
      ...others.map(({ id }) => system.cancel(id)),
    ]);
    expect(refused.status).toBe(status);
    expect(answers.map((answer) => answer.status)).toEqual(others.map(() => 200));
    expect(await system.row(job!.id)).toMatchObject({ status: 'queued', cancelled_by: null });
  });

  it('of an inactive workspace: 403', async () => {
    const { key, workspace } = await system.createWorkspace();
    const job = await system.create('quick');
    await system.pool.query('UPDATE scenario_jobs SET workspace_id = $1 WHERE id = $2', [workspace.id, job.id]);
    await system.pool.query('UPDATE workspaces SET active = false WHERE id = $1', [workspace.id]);
    expect((await system.cancel(job.id, { authorization: `Bearer ${key}` })).status).toBe(403);
    expect((await system.row(job.id)).status).toBe('queued');
  });

  it('is told so before anything else that is wrong', async () => {
    const headers = { authorization: `Bearer ${newApiKey()}`, 'idempotency-key': 'x'.repeat(256) };
    expect((await system.cancel('j1o2b3i4d5x6', headers)).status).toBe(401);
  });
});

it('no key is ever logged or stored', async () => {
  await ask(`Bearer ${system.key}`);
  await ask(`Bearer ${system.key}x`);
  // Places where somebody could put a key by mistake.
  await system.request('GET', `/${system.key}`);
  await system.cancel(system.key);
  await system.request('GET', `?key=${system.key}`);
  await system.cancel('j1o2b3i4d5x6', { 'x-request-id': system.key });
  expect(JSON.stringify([await system.apiLog(), system.api.printed])).not.toContain(system.key.slice(10));
  const { rows } = await system.pool.query('SELECT * FROM api_keys');
  expect(JSON.stringify(rows)).not.toContain(system.key.slice(10));
});
