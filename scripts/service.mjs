// The whole service for development: its servers, its database, an api and a worker. Used by up and demo.
import { spawnSync } from 'node:child_process';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { root } from './prepare.mjs';
import { freePort, startPostgres, startRedis } from './servers.mjs';

const READY_WITHIN_MS = 60_000;

/** What a running `npm run up` tells other scripts: its process id, its database and its URL. */
export const STATE = join(root, '.local', 'up', 'environment.json');

/** Where Postgres and Redis are: those that the environment names, or ones that are started in `place`. */
export async function startServers(processes, place, { say, onExit }) {
  let { DATABASE_URL: databaseUrl, REDIS_URL: redisUrl } = process.env;
  if (!databaseUrl) {
    say('Starting Postgres');
    databaseUrl = await startPostgres(processes, place, { onExit });
  }
  if (!redisUrl) {
    say('Starting Redis');
    redisUrl = await startRedis(processes, place, { say, onExit });
  }
  say('Applying migrations');
  runProgram('dist/cli/migrate.js', [], { DATABASE_URL: databaseUrl });
  return { DATABASE_URL: databaseUrl, REDIS_URL: redisUrl };
}

/** Runs one of the service's programs to its end, and returns what it printed. */
export function runProgram(program, args, environment) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [join(root, program), ...args], {
    env: { ...process.env, ...environment },
    encoding: 'utf8',
  });
  if (status !== 0) throw new Error(`${program} ${args.join(' ')} failed:\n${stderr}`);
  return stdout.trim();
}

/** A new key of this name in this workspace; earlier ones of the same name are revoked. */
export function renewKey(workspace, name, environment) {
  const listed = runProgram('dist/cli/api-key.js', ['list', '--workspace', workspace], environment);
  for (const line of listed.split('\n')) {
    const [id, , listedName, state] = line.split('\t');
    if (listedName === name && state === 'active') runProgram('dist/cli/api-key.js', ['revoke', id], environment);
  }
  return runProgram('dist/cli/api-key.js', ['create', '--workspace', workspace, '--name', name], environment);
}

/** Starts an api and a worker, and waits until both are ready. Returns the base URLs of both. */
export async function startService(processes, environment, { onExit, stdio }) {
  const host = environment.HOST;
  let ended;
  const watch = (why) => {
    ended = why;
    onExit(why);
  };
  const start = (name, program) =>
    processes.start(name, process.execPath, ['--enable-source-maps', join(root, 'dist', program)], {
      env: { ...process.env, ...environment },
      onExit: watch,
      ...(stdio && { stdio }),
    });
  start('api', 'main.api.js');
  start('worker', 'main.worker.js');
  const urls = [environment.PORT, environment.WORKER_PORT].map((port) => `http://${host}:${port}`);
  for (const url of urls) {
    const deadline = Date.now() + READY_WITHIN_MS;
    for (;;) {
      if (ended) throw new Error(ended);
      const ready = await fetch(`${url}/readyz`).then(
        (response) => response.ok,
        () => false,
      );
      if (ready) break;
      if (Date.now() > deadline) throw new Error(`${url} was not ready within ${READY_WITHIN_MS / 1000} s`);
      await sleep(50);
    }
  }
  return { api: urls[0], worker: urls[1] };
}

/** The port that was asked for, else `usual` if nobody has it, else any free one. */
export async function choosePort(name, usual) {
  const wanted = process.env[name];
  if (wanted !== undefined && wanted !== '') {
    if (!/^\d{1,5}$/.test(wanted) || Number(wanted) < 1 || Number(wanted) > 65535) {
      throw new Error(`${name} must be a port from 1 to 65535`);
    }
    if (!(await isFree(Number(wanted))))
      throw new Error(`${name}=${wanted} is in use by another program; choose another`);
    return Number(wanted);
  }
  return (await isFree(usual)) ? usual : freePort();
}

function isFree(port) {
  return new Promise((resolve) => {
    const server = createServer();
    server.once('error', () => resolve(false));
    server.listen(port, '127.0.0.1', () => server.close(() => resolve(true)));
  });
}
