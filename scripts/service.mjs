// The whole service for development: its servers, its database, an api and a worker. Used by up and demo.
import { readFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { basename, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { root } from './prepare.mjs';
import { freePort, startPostgres, startRedis } from './servers.mjs';

const READY_WITHIN_MS = 60_000;

const { scripts } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));

/** The flags of Node that `npm run start:api` gives `main.api.js`, and `start:worker` gives `main.worker.js`. */
export function nodeFlagsOf(program) {
  const command = Object.values(scripts).find((one) => one.endsWith(` dist/${program}`));
  return command.split(' ').slice(2, -1);
}

/** The file in which a running `npm run up` tells other scripts its process id, database, Redis and URL. */
export const STATE = join(root, '.local', 'up', 'environment.json');

/**
 * Ends everything on a signal, at once on a second one, and when one of the processes ends by itself. `options` go to
 * `stop`; `cleanUp` runs when everything has ended.
 */
export function endOnSignal(processes, { say, cleanUp, ...options }) {
  let ending = false;
  // Closing a terminal sends a signal as well, and then nothing can be written to it any more.
  for (const stream of [process.stdout, process.stderr]) stream.on('error', () => undefined);
  const end = async (why, finish) => {
    if (ending) return;
    ending = true;
    say(`\n${why}\nStopping everything. Ctrl-C (again) stops it at once.`);
    await processes.stop({ say, ...options });
    cleanUp();
    say('Stopped.');
    finish();
  };
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
    process.on(signal, () => {
      const raise = () => {
        process.removeAllListeners(signal);
        process.kill(process.pid, signal);
      };
      if (!ending) return void end(`${signal} received.`, raise);
      processes.kill();
      cleanUp();
      raise();
    });
  }
  return { isEnding: () => ending, onExit: (why) => void end(why, () => process.exit(1)) };
}

/** Throws if the service would refuse these settings, before anything is started for it. */
export async function checkSettings(settings) {
  const { parseSettings } = await import('../dist/config/settings.js');
  const { DATABASE_URL, REDIS_URL } = process.env;
  const urls = { DATABASE_URL: DATABASE_URL || 'postgres://later', REDIS_URL: REDIS_URL || 'redis://later' };
  parseSettings({ ...process.env, ...settings, ...urls });
}

/**
 * The URLs of Postgres and Redis: those in the environment, or those of servers started in `place`. Migrates the
 * database.
 */
export async function startServers(processes, place, { say, onExit }) {
  let { DATABASE_URL: databaseUrl, REDIS_URL: redisUrl } = process.env;
  if (!databaseUrl) {
    say('Starting Postgres');
    databaseUrl = await startPostgres(processes, place, { onExit });
  } else say('Using the Postgres that DATABASE_URL names');
  if (!redisUrl) {
    say('Starting Redis');
    redisUrl = await startRedis(processes, place, { say, onExit });
  } else say('Using the Redis that REDIS_URL names');
  say('Applying migrations');
  await runProgram(processes, 'dist/cli/migrate.js', [], { DATABASE_URL: databaseUrl });
  return { DATABASE_URL: databaseUrl, REDIS_URL: redisUrl };
}

/** Runs one of the service's programs to its end, and returns what it printed. */
function runProgram(processes, program, args, environment) {
  const env = { ...process.env, ...environment };
  return processes.run(basename(program, '.js'), process.execPath, [join(root, program), ...args], { env });
}

/** A new key of this name in this workspace; earlier keys of the same name are revoked. */
export async function renewKey(processes, workspace, name, environment) {
  const run = (...args) => runProgram(processes, 'dist/cli/api-key.js', args, environment);
  for (const line of (await run('list', '--workspace', workspace)).split('\n')) {
    const [id, , listedName, state] = line.split('\t');
    if (listedName === name && state === 'active') await run('revoke', id);
  }
  return run('create', '--workspace', workspace, '--name', name);
}

/** Starts an api and a worker, and waits until both are ready. Returns the base URLs of both. */
export async function startService(processes, environment, { onExit, stdio }) {
  let ended;
  const watch = (why) => {
    ended = why;
    onExit(why);
  };
  const start = (name, program) =>
    processes.start(name, process.execPath, [...nodeFlagsOf(program), join(root, 'dist', program)], {
      env: { ...process.env, ...environment },
      onExit: watch,
      ...(stdio && { stdio }),
    });
  start('api', 'main.api.js');
  start('worker', 'main.worker.js');
  const host = addressOf(environment.HOST);
  const urls = [environment.PORT, environment.WORKER_PORT].map((port) => `http://${host}:${port}`);
  for (const url of urls) await untilReady(url, () => ended);
  return { api: urls[0], worker: urls[1] };
}

/** Waits until `/readyz` says so. Throws if that takes too long, or once `failed` says what has gone wrong. */
export async function untilReady(url, failed) {
  const deadline = Date.now() + READY_WITHIN_MS;
  for (;;) {
    const why = failed();
    if (why) throw new Error(why);
    const ready = await fetch(`${url}/readyz`).then(
      (response) => response.ok,
      () => false,
    );
    if (ready) return;
    if (Date.now() > deadline) throw new Error(`${url} was not ready within ${READY_WITHIN_MS / 1000} s`);
    await sleep(10);
  }
}

/** The address at which a program on this machine reaches what listens on `host`. */
function addressOf(host) {
  if (host === '0.0.0.0' || host === '::') return '127.0.0.1';
  return host.includes(':') ? `[${host}]` : host;
}

/** Ports of api and worker on `host`: those asked for, else the usual ones, else any that are free. */
export async function choosePorts(host) {
  const asked = Object.fromEntries(['PORT', 'WORKER_PORT'].map((name) => [name, portIn(name)]));
  if (asked.PORT && asked.PORT === asked.WORKER_PORT) throw new Error('PORT and WORKER_PORT must differ');
  for (const [name, port] of Object.entries(asked)) {
    if (port && !(await isFree(port, host))) {
      throw new Error(
        `${name}=${port} cannot be listened on: another program has it, or it is not allowed; choose another`,
      );
    }
  }
  const choose = async (usual, other) => (usual !== other && (await isFree(usual, host)) ? usual : freePort());
  const take = async (port, usual, other) => port || (port === 0 ? freePort() : choose(usual, other));
  const PORT = await take(asked.PORT, 3000, asked.WORKER_PORT);
  const WORKER_PORT = await take(asked.WORKER_PORT, 3001, PORT);
  return { PORT: String(PORT), WORKER_PORT: String(WORKER_PORT) };
}

function portIn(name) {
  const value = process.env[name];
  if (!value) return undefined;
  if (!/^\d{1,5}$/.test(value) || Number(value) > 65535) {
    throw new Error(`${name} must be a port from 0 to 65535`);
  }
  return Number(value);
}

function isFree(port, host) {
  return new Promise((resolve) => {
    const server = createServer();
    server.once('error', () => resolve(false));
    server.listen(port, host, () => server.close(() => resolve(true)));
  });
}
