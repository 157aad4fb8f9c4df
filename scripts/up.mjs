// npm run up: the whole service on this machine, from a fresh clone, until Ctrl-C.
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { prepare, root } from './prepare.mjs';
import { Processes } from './processes.mjs';
import { reachable } from './servers.mjs';
import { checkSettings, choosePorts, endOnSignal, renewKey, startServers, startService, STATE } from './service.mjs';

const HELP = `Usage: npm run up

Installs and builds what is missing, starts Postgres, Redis, an api and a worker, and prints a key and lines to
paste. Ctrl-C stops everything that it started; a second Ctrl-C kills it at once. Data is kept in .local/up.

Environment
  PORT           port of the api (3000, or a free one if that is taken)
  DATABASE_URL   your own Postgres, instead of one that is started here
  REDIS_URL      your own Redis, instead of one that is started here
  and every other setting that the README lists. Unless they are set, HOST is 127.0.0.1, DRAIN_MS 2000, LOG_FORMAT
  pretty, and SCENARIO_TASK examples/demo-task.mjs

Exit codes: that of the signal that ended it, 1 failed, 2 wrong usage.
`;

const say = (line) => console.log(line);

async function main(args) {
  if (args.includes('--help') || args.includes('-h')) return void process.stdout.write(HELP);
  if (args.length > 0) {
    process.stderr.write(`Unknown argument: ${args[0]}\n\n${HELP}`);
    process.exitCode = 2;
    return;
  }
  const place = reachable(join(root, '.local', 'up'));
  // Checked before anything is built: a build would replace the programs of a service that already runs here.
  const processes = await Processes.open(place);
  await prepare(say);
  const { onExit, isEnding } = endOnSignal(processes, { say, cleanUp: () => rmSync(STATE, { force: true }) });
  try {
    const host = process.env.HOST || '127.0.0.1';
    const settings = {
      NODE_ENV: 'development',
      HOST: host,
      ...(await choosePorts(host)),
      // Whoever presses Ctrl-C does not want to wait half a minute for a task.
      DRAIN_MS: process.env.DRAIN_MS || '2000',
      LOG_FORMAT: process.env.LOG_FORMAT || 'pretty',
      SCENARIO_TASK: process.env.SCENARIO_TASK || join(root, 'examples', 'demo-task.mjs'),
    };
    await checkSettings(settings);
    const environment = { ...settings, ...(await startServers(processes, place, { say, onExit })) };
    const key = await renewKey(processes, 'demo', 'demo', environment);
    say('Starting api and worker');
    const urls = await startService(processes, environment, { onExit, stdio: ['ignore', 'inherit', 'inherit'] });
    writeState(environment, urls.api);
    say(banner(urls, key, { withDemoTask: !process.env.SCENARIO_TASK }));
  } catch (error) {
    // A signal has stopped the start half-way: what was under way has failed, and everything is already being ended.
    if (isEnding()) return;
    await processes.stop();
    throw error;
  }
}

function writeState({ DATABASE_URL: databaseUrl, REDIS_URL: redisUrl }, url) {
  mkdirSync(dirname(STATE), { recursive: true });
  rmSync(STATE, { force: true });
  writeFileSync(STATE, JSON.stringify({ pid: process.pid, databaseUrl, redisUrl, url }), { mode: 0o600 });
}

function banner({ api, worker }, key, { withDemoTask }) {
  const authorized = `-H "Authorization: Bearer $KEY"`;
  const create = (prompt) => {
    const body = JSON.stringify({ user_email: 'ada@example.com', prompt });
    const id = `sed 's/^{"id":"\\([^"]*\\)".*/\\1/'`;
    return `JOB=$(curl -s $BASE ${authorized} -H 'Content-Type: application/json' -d '${body}' | ${id}); echo $JOB`;
  };
  const show = `curl -s -w '\\n' $BASE/$JOB ${authorized}`;
  const cancel = `curl -s -w '\\n' -X DELETE $BASE/$JOB ${authorized}`;
  const spin = `  A task that computes without ever yielding: no message reaches it, and yet it is dead a second after its cancel.

${create('[spin]')}; sleep 2
${cancel}

`;
  return `
  Scenario Jobs is running
    api      ${api}/rest/v1     description: ${api}/docs
    worker   ${worker}
    metrics  ${api}/metrics  ${worker}/metrics
    key      ${key}

  Paste into another terminal. Create a job, look at it, cancel it, look again:

BASE=${api}/rest/v1/scenario-studio/jobs
KEY=${key}
${create('Discovery call with an IT director')}
${show}
${cancel}
${show}

${withDemoTask ? spin : ''}  Ctrl-C stops everything.
`;
}

main(process.argv.slice(2)).catch((error) => {
  process.stderr.write(`\n${error.message}\n`);
  process.exit(1);
});
