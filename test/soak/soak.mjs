// npm run soak: many jobs through real processes, while processes and servers fail, and an audit of every job.
import { readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { prepare, root } from '../../scripts/prepare.mjs';
import { Processes } from '../../scripts/processes.mjs';
import { reachable } from '../../scripts/servers.mjs';
import { endOnSignal } from '../../scripts/service.mjs';
import { audit, readRows } from './audit.mjs';
import { Client } from './client.mjs';
import { Faults } from './faults.mjs';
import { figures } from './figures.mjs';
import { load, planJobs } from './load.mjs';
import { Random } from './random.mjs';
import { Watch } from './watch.mjs';
import { World } from './world.mjs';

const HELP = `Usage: npm run soak -- [--jobs N] [--seed N]

Creates jobs through two apis, runs them on three workers and cancels a tenth of them at random moments, while workers
are killed and frozen, apis killed, Postgres restarted and cut off, and Redis frozen, restarted and emptied. Then
compares every job with what its callers were told.

  --jobs N  number of jobs; by default 2000, which take four minutes or more
  --seed N  repeat the jobs, cancels and faults of an earlier run; their exact timing still depends on the machine

Exit codes: 0 nothing contradicts what callers were told, 1 something does, 2 wrong usage.
`;
const PACE_PER_SECOND = 12;
const SETTLED_WITHIN_MS = 300_000;
/** Long enough for any process that still believes it may change something. */
const AFTERWARDS_MS = 3000;
const SHOWN = 30;

class Usage extends Error {}

function readOptions() {
  const { values } = parseArgs({
    options: {
      jobs: { type: 'string', default: '2000' },
      seed: { type: 'string', default: String(1 + Math.floor(Math.random() * 1e9)) },
      help: { type: 'boolean', short: 'h', default: false },
    },
  });
  for (const name of ['jobs', 'seed']) {
    if (!/^[1-9]\d{0,8}$/.test(values[name])) throw new Usage(`--${name} must be a number from 1 to 999999999`);
  }
  return { help: values.help, jobs: Number(values.jobs), seed: Number(values.seed) };
}

async function main() {
  const { help, jobs, seed } = readOptions();
  if (help) return void process.stdout.write(HELP);
  const began = Date.now();
  const say = (line) => console.log(`${String(Math.round((Date.now() - began) / 1000)).padStart(4)} s  ${line}`);
  await prepare(console.log);
  console.log(`${jobs} jobs, seed ${seed}`);
  const place = reachable(join(root, '.local', 'soak'));
  const processes = await Processes.open(place);
  for (const left of ['postgres', 'redis']) rmSync(join(place, left), { recursive: true, force: true });
  for (const log of readdirSync(place).filter((name) => name.endsWith('.log'))) rmSync(join(place, log));
  const cleanUp = () => rmSync(place, { recursive: true, force: true, maxRetries: 5 });
  const { isEnding } = endOnSignal(processes, { say: console.log, cleanUp, patienceMs: 5000 });
  try {
    const faulty = await soak({ processes, place, jobs, seed, say });
    process.exitCode = faulty.length === 0 ? 0 : 1;
    await processes.stop({ patienceMs: 20_000 });
    if (faulty.length === 0) cleanUp();
    else console.log(`The logs are in ${place}`);
  } catch (error) {
    if (isEnding()) return;
    processes.kill();
    throw new Error(`${error.message}\nThe logs are in ${place}`, { cause: error });
  }
}

async function soak({ processes, place, jobs: count, seed, say }) {
  const began = Date.now();
  const plans = planJobs(count, new Random(seed));
  const world = await World.start(processes, place);
  const watch = new Watch(world);
  const client = new Client(world, new Random(seed + 1));
  const faults = new Faults(world, new Random(seed + 2), say);
  say('the service runs; the load begins');
  faults.start();
  const jobs = await load({ plans, client, watch, pacePerSecond: PACE_PER_SECOND, say });
  await faults.stop();
  say('the load and the faults are over');
  await untilSettled(world, say);
  const earlier = await readRows(world);
  await sleep(AFTERWARDS_MS);
  watch.stop();
  const rows = await readRows(world);
  const logs = world.logLines();
  const { faulty, begun } = audit({ world, jobs, client, watch, faults, earlier, rows, logs });
  await world.pool.end();
  const seconds = (Date.now() - began) / 1000;
  console.log(`\n${figures({ jobs, client, watch, faults, rows, logs, begun, seconds }).join('\n')}\n`);
  for (const sentence of faulty.slice(0, SHOWN)) console.log(`CONTRADICTED: ${sentence}`);
  if (faulty.length > SHOWN) console.log(`and ${faulty.length - SHOWN} more`);
  console.log(
    faulty.length === 0
      ? 'Nothing contradicts what callers were told.'
      : `${faulty.length} contradictions. Seed ${seed}.`,
  );
  return faulty;
}

/** Waits until every job has ended and every cancelled run is confirmed to be gone; gives up after a long time. */
async function untilSettled(world, say) {
  for (const deadline = Date.now() + SETTLED_WITHIN_MS; Date.now() < deadline; await sleep(500)) {
    const [left] = await world.query(
      `SELECT count(*) FILTER (WHERE status IN ('queued', 'processing'))::int AS unfinished,
              count(*) FILTER (WHERE status = 'cancelled' AND run_id IS NOT NULL AND stopped_at IS NULL)::int AS stopping
       FROM scenario_jobs`,
    );
    if (left.unfinished + left.stopping === 0) return;
    say(`${left.unfinished} unfinished, ${left.stopping} stopping${await someOf(world)}`);
    await sleep(3000);
  }
}

/** A few of the jobs that are not over, to show what they wait for. */
async function someOf(world) {
  const rows = await world.query(
    `SELECT j.id, j.status, j.attempt, j.prompt FROM scenario_jobs j
     WHERE status IN ('queued', 'processing') OR (status = 'cancelled' AND run_id IS NOT NULL AND stopped_at IS NULL)
     ORDER BY j.attempt DESC LIMIT 2`,
  );
  return rows.map(({ id, status, attempt, prompt }) => `; ${id}: ${prompt}, ${status}, attempt ${attempt}`).join('');
}

main().catch((error) => {
  const usage = error instanceof Usage || error.code?.startsWith('ERR_PARSE_ARGS');
  process.stderr.write(usage ? `${error.message}\n\n${HELP}` : `${error.stack}\n`);
  process.exitCode = usage ? 2 : 1;
});
