// npm run up: the whole service on this machine, from a fresh clone, until Ctrl-C.
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { prepare, root } from './prepare.mjs';
import { Processes } from './processes.mjs';
import { reachable } from './servers.mjs';
import { choosePort, renewKey, startServers, startService, STATE } from './service.mjs';

const HELP = `Usage: npm run up

Installs and builds what is missing, starts Postgres, Redis, an api and a worker, and prints a key and lines to
paste. Ctrl-C ends everything that it started, a second Ctrl-C at once. Data is kept in .local/up.

Environment
  PORT           port of the api (3000, or a free one if that is taken)
  DATABASE_URL   a Postgres of yours, instead of one that is started here
  REDIS_URL      a Redis of yours, instead of one that is started here
  and every other setting that the README lists

Exit codes: 0 or the signal that ended it, 1 failed, 2 wrong usage.
`;

const say = (line) => console.log(line);

async function main(args) {
  if (args.includes('--help') || args.includes('-h')) return void process.stdout.write(HELP);
  if (args.length > 0) {
    process.stderr.write(`Unknown argument: ${args[0]}\n\n${HELP}`);
    process.exitCode = 2;
    return;
  }
  await prepare(say);
  const place = reachable(join(root, '.local', 'up'));
  const processes = await Processes.open(place);
  const { onExit, isEnding } = endOnSignal(processes);
  try {
    const environment = {
      NODE_ENV: 'development',
      HOST: process.env.HOST || '127.0.0.1',
      PORT: String(await choosePort('PORT', 3000)),
      WORKER_PORT: String(await choosePort('WORKER_PORT', 3001)),
      // Ctrl-C is meant: nobody waits half a minute for a task.
      DRAIN_MS: process.env.DRAIN_MS || '2000',
      LOG_FORMAT: process.env.LOG_FORMAT || 'pretty',
      SCENARIO_TASK: process.env.SCENARIO_TASK || join(root, 'examples', 'demo-task.mjs'),
      ...(await startServers(processes, place, { say, onExit })),
    };
    const key = renewKey('demo', 'demo', environment);
    say('Starting api and worker');
    const { api, worker } = await startService(processes, environment, {
      onExit,
      stdio: ['ignore', 'inherit', 'inherit'],
    });
    mkdirSync(dirname(STATE), { recursive: true });
    writeFileSync(STATE, JSON.stringify({ pid: process.pid, DATABASE_URL: environment.DATABASE_URL, url: api }), {
      mode: 0o600,
    });
    say(banner(api, worker, key));
  } catch (error) {
    if (isEnding()) return;
    await processes.stop();
    throw error;
  }
}

/** Ends everything when a signal comes, or when one of the processes ends by itself. */
function endOnSignal(processes) {
  let ending = false;
  const end = async (why, finish) => {
    if (ending) return;
    ending = true;
    say(`\n${why}; stopping worker, api, Redis and Postgres. Ctrl-C again stops them at once.`);
    await processes.stop({ say });
    rmSync(STATE, { force: true });
    say('Stopped.');
    finish();
  };
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
    process.on(signal, () => {
      const raise = () => {
        process.removeAllListeners(signal);
        process.kill(process.pid, signal);
      };
      if (!ending) return void end(`${signal} received`, raise);
      processes.kill();
      rmSync(STATE, { force: true });
      raise();
    });
  }
  return { isEnding: () => ending, onExit: (why) => void end(why, () => process.exit(1)) };
}

function banner(api, worker, key) {
  return `
  Scenario Jobs is running
    api      ${api}/rest/v1     description: ${api}/docs
    worker   ${worker}
    metrics  ${api}/metrics  ${worker}/metrics
    key      ${key}

  Paste into another terminal:

    BASE=${api}/rest/v1/scenario-studio/jobs
    KEY=${key}
    create() { curl -s $BASE -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' -d "{\\"user_email\\":\\"ada@example.com\\",\\"prompt\\":\\"$1\\"}"; echo; }
    show() { curl -s $BASE/$1 -H "Authorization: Bearer $KEY"; echo; }
    cancel() { curl -s -X DELETE $BASE/$1 -H "Authorization: Bearer $KEY"; echo; }

    create 'Discovery call with an IT director'      # answers with the job and its id
    show JOB_ID
    cancel JOB_ID

    create '[spin] computes without ever yielding'   # no message reaches such a task
    cancel JOB_ID                                    # and it is dead a second later all the same

  Ctrl-C stops everything.
`;
}

main(process.argv.slice(2)).catch((error) => {
  process.stderr.write(`\n${error.message}\n`);
  process.exit(1);
});
