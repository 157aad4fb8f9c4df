// npm run demo: starts the whole service with an empty database, cancels jobs of several kinds over HTTP, and
// prints what happened and how long it took until each process was dead.
import { readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { prepare, root } from './prepare.mjs';
import { Processes } from './processes.mjs';
import { freePort, reachable } from './servers.mjs';
import { endOnSignal, renewKey, startServers, startService } from './service.mjs';

const HELP = `Usage: npm run demo

Starts the service on servers of its own. Cancels a queued job, a cooperative one, one that computes without yielding,
one that ignores SIGTERM, and one whose message to the worker is lost, and prints how long each took to die. Takes
about half a minute.

Exit codes: 0 everything as promised, 1 something not, 2 wrong usage.
`;
const PATIENCE_MS = 30_000;
/** How much later than promised a process may end on a busy machine. */
const SLACK_MS = 2000;
const say = (line = '') => console.log(line);
const results = [];

async function main(args) {
  if (args.includes('--help') || args.includes('-h')) return void process.stdout.write(HELP);
  if (args.length > 0) {
    process.stderr.write(`Unknown argument: ${args[0]}\n\n${HELP}`);
    process.exitCode = 2;
    return;
  }
  const place = reachable(join(root, '.local', 'demo'));
  const processes = await Processes.open(place);
  await prepare(say);
  const { default: pg } = await import('pg');

  // Always uses servers of its own, because it freezes Redis, and the default settings, because its promises hold for
  // those.
  const { SETTINGS } = await import('../dist/config/settings.js');
  for (const name of Object.keys(SETTINGS)) delete process.env[name];
  for (const left of ['postgres', 'redis', 'worker.log', 'api.log'])
    rmSync(join(place, left), { recursive: true, force: true });
  const cleanUp = () => rmSync(place, { recursive: true, force: true, maxRetries: 5 });
  const { onExit, isEnding } = endOnSignal(processes, { say, cleanUp, patienceMs: 2000 });
  let database;
  try {
    const environment = {
      NODE_ENV: 'production',
      HOST: '127.0.0.1',
      PORT: String(await freePort()),
      WORKER_PORT: String(await freePort()),
      WORKER_CONCURRENCY: '2',
      LOG_FORMAT: 'json',
      LOG_LEVEL: 'info',
      SCENARIO_TASK: join(root, 'examples', 'demo-task.mjs'),
      ...(await startServers(processes, place, { say, onExit })),
    };
    const key = await renewKey(processes, 'demo', 'demo', environment);
    say('Starting api and worker');
    const { api } = await startService(processes, environment, { onExit });
    database = new pg.Pool({ connectionString: environment.DATABASE_URL, max: 1 });
    database.on('error', () => undefined);
    await play({
      client: createClient(api, key),
      database,
      workerLog: join(place, 'worker.log'),
      redisPid: processes.pidOf('redis'),
    });
  } catch (error) {
    // A signal has stopped the demo half-way: what was under way has failed, and everything is already being ended.
    if (isEnding()) return;
    await processes.stop();
    throw new Error(`${error.message}\nThe logs are in ${place}`, { cause: error });
  }
  if (isEnding()) return;
  await database.end();
  await processes.stop();
  cleanUp();
}

async function play({ client, database, workerLog, redisPid }) {
  const stage = { client, database, workerLog };

  heading('A job that nobody cancels makes a scenario');
  const { body: finished } = await client.create('Discovery call with an IT director');
  const completed = await until('the job is completed', async () => {
    const { body } = await client.get(finished.id, { quiet: true });
    return body.status !== 'queued' && body.status !== 'processing' && body;
  });
  await client.get(finished.id);
  check(completed.status === 'completed', 'the job completed');
  say(`  ${completed.scenario.name}\n  ${completed.scenario.url}`);

  heading('A queued job: both places of the worker are taken, so it waits');
  const busy = [await running(stage, '[stubborn] one'), await running(stage, '[stubborn] two')];
  const { body: queued } = await client.create('Waits behind the others');
  const { body: cancelled, ms } = await client.cancel(queued.id);
  check(cancelled.status === 'cancelled' && cancelled.started_at === null, 'it is cancelled and was never started');
  results.push(['queued', ms, null, 'never started']);

  heading('Cancelling it again');
  const again = await client.cancel(queued.id);
  check(
    again.status === 400 && again.body.error.code === 'job_not_cancellable',
    'the answer is 400 job_not_cancellable',
  );

  heading('Tasks that ignore SIGTERM: acknowledged, so they have their grace; then SIGTERM, then SIGKILL');
  const kinds = ['ignores SIGTERM', 'another like it'];
  await Promise.all(
    busy.map((job, index) => cancelAndWatch(stage, job, kinds[index], { how: 'killed', within: 7000 })),
  );

  heading('A cooperative task');
  const cooperative = await running(stage, 'Heeds its AbortSignal');
  check(
    (await client.get(queued.id)).body.started_at === null && runOf(workerLog, queued.id) === undefined,
    'a later job has begun, but the cancelled one never did',
  );
  await cancelAndWatch(stage, cooperative, 'cooperative', { how: 'graceful', within: 0 });

  heading('A task that computes without ever yielding: it cannot acknowledge, so it has no grace');
  await cancelAndWatch(stage, await running(stage, '[spin]'), 'CPU-bound', { how: 'terminated', within: 1000 });

  heading('Redis frozen: the message to the worker is lost, the poll is enough');
  const lost = await running(stage, 'Will not hear the doorbell');
  process.kill(redisPid, 'SIGSTOP');
  try {
    await cancelAndWatch(stage, lost, 'message lost', { how: 'graceful', within: 2000, idempotencyKey: 'retry-1' });
  } finally {
    process.kill(redisPid, 'SIGCONT');
  }

  heading('The same request again, with the same Idempotency-Key');
  const replay = await client.cancel(lost.id, 'retry-1');
  check(replay.status === 200 && replay.body.status === 'cancelled', 'the answer is the 200 of the first request');

  heading('How long each cancel took');
  const columns = ['task', 'answered after', 'process dead after', 'how it ended'];
  const rows = results.map(([kind, answered, dead, how]) => [
    kind,
    `${Math.round(answered)} ms`,
    dead === null ? '-' : `${Math.round(dead)} ms`,
    how,
  ]);
  for (const row of [columns, ...rows])
    say(`  ${row.map((cell, index) => cell.padEnd([18, 16, 20, 0][index])).join('')}`);
  say('\n  Everything was as promised.');
}

/** Creates a job and waits until its task has begun. The worker's log names its process. */
async function running({ client, workerLog }, prompt) {
  const { body } = await client.create(prompt);
  const pid = await until('its task has begun', () => runOf(workerLog, body.id)?.pid);
  return { id: body.id, pid };
}

/** What the worker's log says of a job's run: undefined before it began, and no `pid` before its task printed. */
function runOf(workerLog, id) {
  const lines = readFileSync(workerLog, 'utf8')
    .split('\n')
    .filter((line) => line.includes(id) && line.endsWith('}'))
    .map((line) => JSON.parse(line));
  const began = lines.find(({ msg }) => msg === 'run began');
  return began && { pid: lines.some(({ msg }) => msg === 'task output') ? began.taskPid : undefined };
}

/** Cancels a running job, and watches its process group from outside until the group is gone. */
async function cancelAndWatch({ client, database }, { id, pid }, kind, { how, within, idempotencyKey }) {
  const began = performance.now();
  const gone = untilGone(pid).then(() => performance.now() - began);
  const { status, body, ms } = await client.cancel(id, idempotencyKey);
  check(status === 200 && body.status === 'cancelled', 'it is cancelled');
  const dead = await gone;
  const stoppedHow = await until('the worker has confirmed it', async () => {
    const { rows } = await database.query('SELECT stopped_how FROM scenario_jobs WHERE id = $1', [id]);
    return rows[0].stopped_how;
  });
  say(`  process ${pid} and its group: gone after ${Math.round(dead)} ms (stopped_how: ${stoppedHow})`);
  check(stoppedHow === how && dead < within + SLACK_MS, 'as it should be, and within the time promised');
  const { body: later } = await client.get(id);
  const { rows: scenarios } = await database.query('SELECT id FROM scenarios WHERE job_id = $1', [id]);
  check(later.status === 'cancelled' && scenarios.length === 0, 'it stays cancelled, and left no scenario');
  results.push([kind, ms, dead, stoppedHow]);
}

/** Looks every millisecond, because the time is a result. */
const untilGone = (pid) => until(`process group ${pid} is gone`, () => !groupLives(pid), 1);

function groupLives(pid) {
  try {
    return process.kill(-pid, 0);
  } catch {
    return false;
  }
}

function createClient(api, key) {
  const base = `${api}/rest/v1/scenario-studio/jobs`;
  const request = async (method, path, { body, headers = {}, quiet = false } = {}) => {
    const began = performance.now();
    const response = await fetch(base + path, {
      method,
      headers: { authorization: `Bearer ${key}`, ...(body && { 'content-type': 'application/json' }), ...headers },
      ...(body && { body: JSON.stringify(body) }),
    });
    const answer = { status: response.status, body: await response.json(), ms: performance.now() - began };
    if (!quiet) say(`  ${method} ${path || '/'} → ${answer.status} ${brief(answer.body)}`);
    return answer;
  };
  return {
    create: (prompt) => request('POST', '', { body: { user_email: 'ada@example.com', prompt } }),
    get: (id, options) => request('GET', `/${id}`, options),
    cancel: (id, idempotencyKey) =>
      request('DELETE', `/${id}`, { headers: idempotencyKey ? { 'idempotency-key': idempotencyKey } : {} }),
  };
}

const brief = ({ error, id, status, started_at, duration_seconds }) =>
  error ? JSON.stringify({ error }) : JSON.stringify({ id, status, started_at, duration_seconds });

async function until(what, look, pauseMs = 10) {
  const deadline = Date.now() + PATIENCE_MS;
  while (Date.now() < deadline) {
    const found = await look();
    if (found) return found;
    await sleep(pauseMs);
  }
  throw new Error(`Not within ${PATIENCE_MS / 1000} s: ${what}`);
}

function check(holds, what) {
  if (!holds) throw new Error(`Not as promised: ${what}`);
  say(`  ✓ ${what}`);
}

function heading(text) {
  say(`\n${text}`);
}

main(process.argv.slice(2)).catch((error) => {
  process.stderr.write(`\n${error.message}\n`);
  process.exit(1);
});
