import { spawn, spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { Client } from 'pg';
import { eventually } from '../support/eventually';
import { clockAheadBy } from '../support/node-options';
import { DIST, ServiceProcess } from '../support/service-process';
import { TcpProxy } from '../support/tcp-proxy';
import { TestSystem } from '../support/test-system';

const HOUR_MS = 3_600_000;

let system: TestSystem;
beforeAll(async () => {
  system = await TestSystem.start({ workers: 0 });
});
afterAll(() => system.stop());

const program = (name: 'api-key' | 'migrate') => join(DIST, 'cli', `${name}.js`);

function run(name: 'api-key' | 'migrate', args: string[], environment: Record<string, string> = {}) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [program(name), ...args], {
    env: { PATH: process.env.PATH, DATABASE_URL: system.settings.DATABASE_URL, ...environment },
    encoding: 'utf8',
  });
  return { status, out: stdout.trim(), err: stderr.trim() };
}

const keys = (...args: string[]) => run('api-key', args);
/** Runs `api-key` while nobody reads its output. */
async function unread(...args: string[]) {
  const child = spawn(process.execPath, [program('api-key'), ...args], {
    env: { PATH: process.env.PATH, DATABASE_URL: system.settings.DATABASE_URL },
  });
  child.stdout.destroy();
  let err = '';
  child.stderr.on('data', (chunk) => (err += String(chunk)));
  const [code] = (await once(child, 'close')) as [number];
  return { code, err };
}
const works = async (key: string) => {
  const { status } = await system.request('GET', '/j1o2b3i4d5x6', { headers: { authorization: `Bearer ${key}` } });
  return status === 404;
};
/** The keys of this name, oldest first. */
const named = async (name: string) => {
  const { rows } = await system.pool.query<{ id: string; expires: Date }>(
    'SELECT id, expires_at AS expires FROM api_keys WHERE name = $1 ORDER BY created_at',
    [name],
  );
  return rows.map(({ id, expires }) => ({ id, expires: Number(expires) }));
};
/** A database beside the system's own, without tables. */
const emptyDatabase = async (options = '') => {
  const name = `empty_${randomBytes(6).toString('hex')}`;
  await system.pool.query(`CREATE DATABASE ${name} ${options}`);
  return { name, DATABASE_URL: system.url.replace(/[^/]*$/, name) };
};
const newKey = (name: string, times: { expiresAt?: Date; revokedAt?: Date } = {}) =>
  system.createKey(system.workspace.id, { name, ...times });
const inHours = (hours: number) => new Date(Date.now() + hours * HOUR_MS);

describe('api-key', () => {
  it('create prints the key alone, and it works; the workspace is created', async () => {
    const { status, out } = keys('create', '--workspace', 'new-one', '--name', 'first');
    expect({ status, out }).toEqual({ status: 0, out: expect.stringMatching(/^exec_live_[A-Za-z0-9]{40}$/) });
    expect(await works(out)).toBe(true);
    expect(keys('list', '--workspace', 'new-one').out).toMatch(/^\w{12}\tnew-one\tfirst\tactive\tcreated \S+Z$/);
  });

  it('list never shows a key', () => {
    const { out } = keys('create', '--workspace', 'acme', '--name', 'listed', '--expires', '90d');
    const listed = keys('list');
    expect(listed.out).not.toContain(out.slice(10));
    expect(listed.out).toMatch(/listed\tactive\tcreated \S+\texpires \S+/);
  });

  it('list shows the state of each key, those of a workspace together and the oldest first', async () => {
    const { workspace } = await system.createWorkspace('states');
    for (const [name, times] of [
      ['revoked', { expiresAt: inHours(-1), revokedAt: new Date() }],
      ['expired', { expiresAt: inHours(-1) }],
      ['good', { expiresAt: inHours(1) }],
    ] as const) {
      await system.createKey(workspace.id, { name, ...times });
    }
    await system.createWorkspace('another');
    const states = (...args: string[]) => {
      const lines = keys('list', ...args)
        .out.split('\n')
        .map((line) => line.split('\t').slice(1, 4).join(' '));
      return lines.filter((line) => /^(states|another) /.test(line));
    };
    const ended = ['states revoked revoked', 'states expired expired'];
    expect(states()).toEqual(['another test active', 'states test active', ...ended, 'states good active']);
    await system.pool.query('UPDATE workspaces SET active = false WHERE id = $1', [workspace.id]);
    const inactive = ['test', 'good'].map((name) => `states ${name} workspace inactive`);
    expect(states('--workspace', 'states')).toEqual([inactive[0], ...ended, inactive[1]]);
    expect(keys('list', '--workspace', 'nobody')).toEqual({ status: 0, out: '', err: 'No keys' });
  });

  it.each([
    ['30m', HOUR_MS / 2],
    ['12h', 12 * HOUR_MS],
    ['90d', 90 * 24 * HOUR_MS],
  ])('create --expires %s: the key expires after so long', async (time, milliseconds) => {
    const began = Date.now();
    keys('create', '--workspace', 'acme', '--name', time, '--expires', time);
    const [created] = await named(time);
    expect(created!.expires).toBeGreaterThanOrEqual(began + milliseconds);
    expect(created!.expires).toBeLessThanOrEqual(Date.now() + milliseconds);
  });

  it('revoke ends a key at once, and only once', async () => {
    const { key, keyId: id } = await newKey('revoked');
    expect(keys('revoke', id).status).toBe(0);
    expect(await works(key)).toBe(false);
    expect(keys('revoke', id)).toMatchObject({ status: 1, err: `There is no key ${id}, or it is revoked already` });
  });

  it('rotate ends the old key at once, or after the overlap', async () => {
    const { key: first, keyId } = await newKey('rotated');
    const { out: second } = keys('rotate', keyId, '--overlap', '1h');
    expect([await works(first), await works(second)]).toEqual([true, true]);
    const { out: third } = keys('rotate', (await named('rotated')).at(-1)!.id);
    expect([await works(second), await works(third)]).toEqual([false, true]);
  });

  it('rotate takes the place of a key once, for its successor would end with the overlap', async () => {
    const { key, keyId: id } = await newKey('rotated-once');
    expect(keys('rotate', id, '--overlap', '1h').status).toBe(0);
    expect(keys('rotate', id, '--overlap', '1h')).toEqual({
      status: 1,
      out: '',
      err: `There is no key ${id}, or it is revoked, expired or rotated already`,
    });
    expect(await works(key)).toBe(true);
  });

  it('needs no setting but DATABASE_URL', () => {
    expect(run('api-key', ['list'], { REDIS_URL: 'nonsense', PORT: 'abc' }).status).toBe(0);
  });

  it('ends without a word when nobody reads on', async () => {
    expect(await unread('list')).toEqual({ code: 0, err: '' });
  });

  it('create and rotate fail when nobody has seen the key', async () => {
    const { keyId } = await newKey('unseen');
    for (const args of [
      ['rotate', keyId],
      ['create', '--workspace', 'unseen', '--name', 'unseen'],
    ]) {
      const ended = await unread(...args);
      const { id } = (await named('unseen')).at(-1)!;
      expect(ended).toEqual({ code: 1, err: expect.stringContaining(`revoke ${id}`) });
    }
  });

  it('goes by the clock of Postgres', async () => {
    const NODE_OPTIONS = clockAheadBy(-3_600_000);
    const args = ['create', '--workspace', 'clocks', '--name', 'clocks', '--expires', '30m'];
    const { out } = run('api-key', args, { NODE_OPTIONS });
    expect(await works(out)).toBe(true);
  });

  it('rotate lets the old key end after the overlap, and the new one when the old one would have', async () => {
    const ends = inHours(90 * 24);
    const { key, keyId } = await newKey('overlapped', { expiresAt: ends });
    const began = Date.now();
    keys('rotate', keyId, '--overlap', '1h');
    const [old, created] = await named('overlapped');
    expect(old!.expires).toBeGreaterThanOrEqual(began + HOUR_MS);
    expect(old!.expires).toBeLessThanOrEqual(Date.now() + HOUR_MS);
    expect(created!.expires).toBe(Number(ends));
    expect(await works(key)).toBe(true);
  });

  it('rotate renews a key that expires, when it is told for how long', async () => {
    const ends = inHours(0.5);
    const { keyId } = await newKey('renewed', { expiresAt: ends });
    const { err } = keys('rotate', keyId, '--expires', '90d');
    const created = (await named('renewed')).at(-1)!;
    expect(created.expires - Number(ends)).toBeGreaterThan(89 * 24 * HOUR_MS);
    expect(err).toContain(` until ${new Date(created.expires).toISOString()}:`);
  });

  it('rotate never lets the old key live longer', async () => {
    const ends = inHours(0.5);
    const { keyId } = await newKey('short', { expiresAt: ends });
    keys('rotate', keyId, '--overlap', '1h');
    expect((await named('short')).map(({ expires }) => expires)).toEqual([Number(ends), Number(ends)]);
  });

  it.each([
    ['revoked', { revokedAt: new Date() }],
    ['expired', { expiresAt: inHours(-1) }],
  ])('rotate refuses a key that is %s', async (name, times) => {
    const { keyId: id } = await newKey(`was ${name}`, times);
    expect(keys('rotate', id, '--overlap', '1h', '--expires', '90d')).toMatchObject({ status: 1, out: '' });
    expect(await named(`was ${name}`)).toHaveLength(1);
  });

  it.each([
    [[], 'A command is required'],
    [['frobnicate'], 'Unknown command: frobnicate'],
    [['create', '--name', 'x'], '--workspace is required'],
    [['create', '--workspace', 'acme'], '--name is required'],
    [['create', '--workspace', 'Not A Slug', '--name', 'x'], '--workspace must be'],
    [['create', '--workspace=-acme', '--name', 'x'], '--workspace must be'],
    [['create', '--workspace', 'acme', '--name', ''], '--name must be'],
    [['create', '--workspace', 'acme', '--name', 'x', '--expires', 'soon'], '--expires must be'],
    [['create', '--workspace', 'acme', '--name', 'x', '--expires', '0d'], '--expires must be'],
    [['create', '--nonsense'], "Unknown option '--nonsense'"],
    [['list', '--name', 'x'], 'list has no option --name'],
    [['revoke'], 'revoke needs the id of a key'],
    [['revoke', 'a', 'b'], 'Unknown argument: b'],
  ])('%j: wrong usage', (args, message) => {
    const { status, out, err } = keys(...args);
    expect({ status, out }).toEqual({ status: 2, out: '' });
    expect(err).toContain(message);
  });

  it('--help says how it is used', () => {
    expect(keys('--help')).toMatchObject({ status: 0, out: expect.stringMatching(/^Usage: npm run -s api-key/) });
  });

  it('has no command of the names that every object has', () => {
    expect(keys('constructor')).toMatchObject({
      status: 2,
      err: expect.stringMatching(/^Unknown command: constructor/),
    });
  });

  it('says when there is no database', () => {
    const says = 'Postgres cannot be reached, or refuses the log-in; DATABASE_URL names both\n';
    for (const [nowhere, why] of [
      ['postgres://u:secret@127.0.0.1:1/none', "Can't reach database server at 127.0.0.1:1"],
      ['postgres://u:secret@host/none?host=/nowhere', 'connect ENOENT /nowhere/.s.PGSQL.5432'],
    ] as const) {
      const { status, err } = run('api-key', ['list'], { DATABASE_URL: nowhere });
      expect({ status, err }).toEqual({ status: 1, err: `${says}${why}` });
    }
    expect(run('api-key', ['list'], { DATABASE_URL: '' })).toMatchObject({
      status: 2,
      err: expect.stringContaining('DATABASE_URL is required'),
    });
  });

  it('says when the database has no tables', () => {
    expect(run('api-key', ['list'], { DATABASE_URL: process.env.TEST_POSTGRES_URL! })).toMatchObject({
      status: 1,
      err: 'The database has not been migrated: run npm run migrate',
    });
  });
});

describe('migrate', () => {
  const migrations = readdirSync(join(__dirname, '../../prisma/migrations'), { withFileTypes: true })
    .filter((entry) => entry.isDirectory())
    .map(({ name }) => name)
    .sort();

  it('changes nothing when everything is applied', () => {
    const out = `0 migration(s) applied, ${migrations.length} were there before`;
    expect(run('migrate', [])).toMatchObject({ status: 0, out });
  });

  it("makes its tables where the service looks for them, whatever the database's search_path", async () => {
    const { name, DATABASE_URL } = await emptyDatabase();
    await system.pool.query(`ALTER DATABASE ${name} SET search_path = app, public`);
    const client = new Client({ connectionString: DATABASE_URL });
    await client.connect();
    await client.query('CREATE SCHEMA app');
    expect(run('migrate', [], { DATABASE_URL })).toMatchObject({ status: 0 });
    const { rows } = await client.query(`SELECT schemaname FROM pg_tables WHERE tablename = 'scenario_jobs'`);
    expect(rows).toEqual([{ schemaname: 'public' }]);
    await client.end();
    await system.pool.query(`DROP DATABASE ${name}`);
  });

  it('refuses a database that cannot hold every text', async () => {
    const { name, DATABASE_URL } = await emptyDatabase(`TEMPLATE template0 ENCODING LATIN1 LOCALE 'C'`);
    expect(run('migrate', [], { DATABASE_URL })).toMatchObject({
      status: 1,
      err: 'Migration failed: the encoding of the database is LATIN1; it must be UTF8',
    });
    await system.pool.query(`DROP DATABASE ${name}`);
  });

  it('lets the service go on while it waits for somebody who reads a table', async () => {
    await system.pool.query('ALTER TABLE scenario_jobs DROP COLUMN stop_token');
    await system.pool.query('DELETE FROM _prisma_migrations WHERE migration_name = $1', [migrations.at(-1)]);
    const reader = await system.pool.connect();
    await reader.query('BEGIN; SELECT count(*) FROM scenario_jobs');
    // A statement timeout, which operators are advised to set for the role, must not limit a migration.
    const url = new URL(system.settings.DATABASE_URL!);
    url.searchParams.set('options', '-c statement_timeout=1s');
    const migrate = ServiceProcess.runToEnd('cli/migrate.js', { DATABASE_URL: url.href });
    try {
      await eventually('it waits', async () => {
        const { rows } = await system.pool.query(
          `SELECT FROM pg_stat_activity WHERE query LIKE '%stop_token%' AND wait_event_type = 'Lock'`,
        );
        return rows.length > 0;
      });
      // More requests than there are connections; they queue behind the migration until it gives up its lock.
      const body = { user_email: 'ada@example.com', prompt: 'quick' };
      const answers = await Promise.all(Array.from({ length: 40 }, () => system.request('POST', '', { body })));
      expect(answers.map(({ status }) => status)).toEqual(Array(40).fill(201));
    } finally {
      await reader.query('COMMIT');
      reader.release();
    }
    const { exit, printed } = await migrate;
    expect(exit).toEqual({ code: 0, signal: null });
    expect(printed).toContain(`applied ${migrations.at(-1)}`);
    expect(printed).toContain(`${migrations.at(-1)} waits: somebody else uses a table that it changes`);
  });

  it('says whom it waits for, and goes on when that has ended', async () => {
    const other = await system.pool.connect();
    const { rows } = await other.query<{ pid: number }>('SELECT pg_backend_pid() AS pid, pg_advisory_lock(72707369)');
    const migrate = ServiceProcess.runToEnd('cli/migrate.js', { DATABASE_URL: system.settings.DATABASE_URL! });
    await eventually('it has asked who holds the lock', async () => {
      const { rowCount } = await system.pool.query(
        `SELECT FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%FROM pg_locks%' AND state = 'idle'`,
      );
      return rowCount === 1;
    });
    other.release(true);
    const { exit, printed } = await migrate;
    expect(exit).toEqual({ code: 0, signal: null });
    expect(printed).toContain(`Another migration is under way, on connection ${rows[0]!.pid}: waiting`);
  });

  it('says that it has failed when its connection is lost', async () => {
    const proxy = await TcpProxy.start(process.env.TEST_POSTGRES_URL!);
    const cut = proxy.cutWhenSent('pg_try_advisory_lock', 'asked');
    const DATABASE_URL = proxy.through(system.settings.DATABASE_URL!);
    expect(await ServiceProcess.runToEnd('cli/migrate.js', { DATABASE_URL })).toMatchObject({
      exit: { code: 1 },
      printed: ['Migration failed: Connection terminated unexpectedly'],
    });
    await cut;
    await proxy.stop();
  });

  it('keeps the books of Prisma', async () => {
    const { rows } = await system.pool.query('SELECT * FROM _prisma_migrations ORDER BY migration_name');
    const applied = {
      checksum: expect.stringMatching(/^[0-9a-f]{64}$/),
      finished_at: expect.any(Date),
      rolled_back_at: null,
      applied_steps_count: 1,
    };
    expect(rows).toEqual(
      migrations.map((name): unknown => expect.objectContaining({ migration_name: name, ...applied })),
    );
  });

  it('lets an earlier version come back, and refuses a database of something else', async () => {
    const rename = (from: string, to: string) =>
      system.pool.query('UPDATE _prisma_migrations SET migration_name = $2 WHERE migration_name = $1', [from, to]);
    await system.pool.query(
      `INSERT INTO _prisma_migrations (id, checksum, finished_at, migration_name, applied_steps_count)
       VALUES ('later', repeat('0', 64), now(), '99990101000000_later', 1)`,
    );
    expect(run('migrate', [])).toMatchObject({ status: 0, err: '99990101000000_later is of a later version' });
    await rename('99990101000000_later', '20000101000000_other');
    expect(run('migrate', [])).toMatchObject({
      status: 1,
      err: 'Migration failed: 20000101000000_other is applied but not among the files',
    });
    await system.pool.query(`DELETE FROM _prisma_migrations WHERE id = 'later'`);
  });

  it('refuses a database in which a migration was begun and not finished', async () => {
    const finish = (when: string) => system.pool.query(`UPDATE _prisma_migrations SET finished_at = ${when}`);
    await finish('NULL');
    const { status, err } = run('migrate', []);
    expect({ status, err }).toMatchObject({ status: 1, err: expect.stringContaining('was begun and not finished') });
    await finish('now()');
    // But not one in which such a migration counts as rolled back, by `prisma migrate resolve`, and was applied later.
    await system.pool.query(
      `INSERT INTO _prisma_migrations (id, checksum, migration_name, rolled_back_at)
       SELECT 'rolled back', checksum, migration_name, now() FROM _prisma_migrations LIMIT 1`,
    );
    expect(run('migrate', [])).toMatchObject({ status: 0 });
  });

  it('refuses a database whose migrations are not these', async () => {
    await system.pool.query(`UPDATE _prisma_migrations SET checksum = repeat('0', 64)`);
    const { status, err } = run('migrate', []);
    expect({ status, err }).toEqual({
      status: 1,
      err: 'Migration failed: 20261123190000_initial was changed after it was applied',
    });
  });

  it('says what is wrong with how it is called', () => {
    expect(run('migrate', ['--force'])).toMatchObject({
      status: 2,
      err: expect.stringContaining('Unknown argument: --force'),
    });
    expect(run('migrate', [], { DATABASE_URL: '' })).toMatchObject({ status: 2, err: 'DATABASE_URL is required' });
    expect(run('migrate', [], { DATABASE_URL: 'postgres://u:sl/ash@host/db' })).toMatchObject({
      status: 2,
      err: 'DATABASE_URL must be a postgres:// URL',
    });
    expect(run('migrate', ['--help'])).toMatchObject({ status: 0, out: expect.stringContaining('Usage') });
  });
});
