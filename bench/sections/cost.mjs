// cost: memory, start-up, processor time; and that an idle slot of a worker costs nothing.
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { root } from '../../scripts/prepare.mjs';
import { childrenOf, cpuSeconds, memoryOf } from '../proc.mjs';
import { cancelAll, checkCancelled, createMany, makeQueued, openSite } from '../site.mjs';
import { startBareChild } from '../start-bare-child.mjs';
import { figureOf, ratioOf, takeTurns } from '../statistics.mjs';
import { judged, ranged, table } from '../text.mjs';

const require = createRequire(import.meta.url);
const TASK = join(root, 'bench/task.mjs');
const TASKS = 4;
const SLOTS = [1, 100];

export const about = `What the service costs. Memory is given as resident memory, and as the process's share, for which memory that
several processes have in common is divided among them. A task's start is the time from the fork until its code runs, with the
service's own \`TaskProcess\`, compared with a bare \`child_process.fork\` of a module that loads the same task.`;

export async function measure({ stage, load, rounds, quick, say }) {
  if (!existsSync('/proc/self/smaps_rollup')) throw new Error('cost reads /proc, which this system does not have');
  const site = await openSite(stage, 'cost');
  const floor = await stage.startFloor('floor-cost', site.environment);
  const cpu = await measureCpu({ stage, load, site, floor, rounds, quick, say });
  await floor.stop();
  say('cost: start of the processes');
  const starts = await measureStarts(stage, site, quick ? 1 : 5);
  say('cost: memory');
  const memory = await measureMemory({ stage, load, site });
  const taskStart = await measureTaskStart(quick ? 5 : 21, say);
  const slots = await measureSlots({ stage, site, quick, say });
  await site.close();
  return { memory, starts, taskStart, cpu, slots };
}

/** Processor time for a thousand cancels at concurrency 16, in every process that takes part. */
async function measureCpu({ stage, load, site, floor, rounds, quick, say }) {
  const count = quick ? 200 : 2000;
  const side = (server) => async () => {
    const ids = await makeQueued(site, count);
    const spent = () => ({
      server: cpuSeconds(server.pid),
      postgres: cpuSeconds(stage.processes.pidOf('postgres'), { withChildren: true }),
      redis: cpuSeconds(stage.processes.pidOf('redis')),
    });
    const before = spent();
    await cancelAll(load, site, server, ids, 16);
    const after = spent();
    await checkCancelled(site, ids);
    return Object.fromEntries(Object.keys(after).map((who) => [who, ((after[who] - before[who]) / count) * 1000]));
  };
  const sides = { service: side(site.api), floor: side(floor) };
  for (const run of Object.values(sides)) await run();
  const measured = await takeTurns(rounds, sides, (where) => say(`cost: processor time, ${where}`));
  const figures = (all) => Object.fromEntries(['server', 'postgres', 'redis'].map((who) => [who, figureOf(all, who)]));
  return {
    cancels: count,
    service: figures(measured.service),
    floor: figures(measured.floor),
    ratios: Object.fromEntries(
      Object.keys(measured.service[0]).map((who) => [who, ratioOf(measured.service, measured.floor, who)]),
    ),
  };
}

/** Time from the start of each process until it reports that it is ready. */
async function measureStarts(stage, site, times) {
  const starts = { api: [], worker: [] };
  for (let index = 0; index < times; index++) {
    for (const name of Object.keys(starts)) {
      const server = await stage.startService(`${name}-start`, `main.${name}.js`, site.environment);
      starts[name].push({ ms: server.startMs });
      await server.stop();
    }
  }
  return { api: figureOf(starts.api, 'ms'), worker: figureOf(starts.worker, 'ms') };
}

async function measureMemory({ stage, load, site }) {
  const worker = await stage.startService('worker-memory', 'main.worker.js', {
    ...site.environment,
    SCENARIO_TASK: TASK,
    WORKER_CONCURRENCY: String(TASKS),
  });
  const idle = { api: memoryOf(site.api.pid), worker: memoryOf(worker.pid) };
  const [watchdog] = childrenOf(worker.pid);
  await createMany(load, site, site.api, TASKS, 1);
  const tasks = await untilBegun(worker, TASKS, watchdog);
  const memory = {
    api: idle.api,
    worker: idle.worker,
    watchdog: memoryOf(watchdog),
    task: meanOf(tasks.map(memoryOf)),
    'worker with its tasks running': memoryOf(worker.pid),
  };
  const { rows } = await site.pool.query(`SELECT id FROM scenario_jobs WHERE status = 'processing'`);
  await cancelAll(
    load,
    site,
    site.api,
    rows.map(({ id }) => id),
    1,
  );
  await worker.stop();
  return memory;
}

async function untilBegun(worker, count, watchdog) {
  for (let tries = 0; tries < 1000; tries++) {
    const tasks = childrenOf(worker.pid).filter((pid) => pid !== watchdog);
    if (tasks.length === count) {
      await sleep(500); // Their code runs by then.
      return tasks;
    }
    await sleep(20);
  }
  throw new Error('the tasks did not start in time');
}

function meanOf(all) {
  const mean = (name) => all.reduce((sum, one) => sum + one[name], 0) / all.length;
  return { residentMb: mean('residentMb'), shareMb: mean('shareMb') };
}

async function measureTaskStart(rounds, say) {
  const sides = { service: startTask, bare: startBare };
  for (const start of Object.values(sides)) await start();
  const measured = await takeTurns(rounds, sides, (where) => say(`cost: start of a task, ${where}`));
  return {
    service: figureOf(measured.service, 'ms'),
    bare: figureOf(measured.bare, 'ms'),
    ratio: { ...ratioOf(measured.service, measured.bare, 'ms'), atMost: 1.3 },
  };
}

/** Milliseconds from the fork until the task's code began to run, which the task prints. */
const sinceFork = (began, line) => ({ ms: Number(BigInt(line.split(' ')[1]) - began) / 1e6 });

async function startTask() {
  const { TaskProcess } = require('../../dist/modules/scenario-jobs/worker/task-process.js');
  const { TASK_MEMORY_MB } = require('../../dist/config/settings.js').SETTINGS;
  let printed;
  const began = process.hrtime.bigint();
  const task = new TaskProcess({
    runId: randomUUID(),
    memoryMb: TASK_MEMORY_MB.parse(undefined),
    inherit: [],
    stop: { ackMs: 1000, graceMs: 1000, killMs: 1000 },
    onProgress: () => undefined,
    onOutput: (line) => (printed ??= line),
  });
  task.start(TASK, { prompt: '[return]' });
  const { end } = await task.ended;
  if (end.kind !== 'returned') throw new Error(`the task ended as ${end.kind}`);
  return sinceFork(began, printed);
}

async function startBare() {
  const began = process.hrtime.bigint();
  const { child, printed } = startBareChild('[return]');
  const ended = once(child, 'exit');
  const line = await printed;
  await ended;
  return sinceFork(began, line);
}

/** Two workers at once, of one slot and of a hundred, with nothing to do. */
async function measureSlots({ stage, site, quick, say }) {
  const workers = {};
  for (const slots of SLOTS) {
    const environment = { ...site.environment, WORKER_CONCURRENCY: String(slots) };
    workers[slots] = await stage.startService(`worker-${slots}`, 'main.worker.js', environment);
  }
  await sleep(quick ? 1000 : 3000);
  const seconds = quick ? 2 : 10;
  say(`cost: idle workers, ${seconds} s`);
  const before = SLOTS.map((slots) => cpuSeconds(workers[slots].pid));
  await sleep(seconds * 1000);
  const found = SLOTS.map((slots, index) => ({
    slots,
    ...memoryOf(workers[slots].pid),
    cpuShare: (cpuSeconds(workers[slots].pid) - before[index]) / seconds,
  }));
  for (const worker of Object.values(workers)) await worker.stop();
  const [one, many] = found;
  return { seconds, found, ratio: { ...single(many.residentMb / one.residentMb), atMost: 1.1 } };
}

const single = (value) => ({ value, min: value, max: value });

export function show({ memory, starts, taskStart, cpu, slots }) {
  const megabytes = (value) => `${value.toFixed(0)} MB`;
  return [
    table(
      ['process', 'resident', 'its share'],
      Object.entries(memory).map(([name, { residentMb, shareMb }]) => [
        name,
        megabytes(residentMb),
        megabytes(shareMb),
      ]),
    ),
    table(
      ['start', 'ms', 'bare fork, ms', 'ratio'],
      [
        ['api, until it is ready', ranged(starts.api), '', ''],
        ['worker, until it is ready', ranged(starts.worker), '', ''],
        ['task, until its code runs', ranged(taskStart.service), ranged(taskStart.bare), judged(taskStart.ratio)],
      ],
    ),
    table(
      ['processor seconds per 1000 cancels', 'service', 'floor', 'ratio'],
      ['server', 'postgres', 'redis'].map((who) => [
        who,
        ranged(cpu.service[who]),
        ranged(cpu.floor[who]),
        judged(cpu.ratios[who]),
      ]),
    ),
    table(
      ['idle worker', 'resident', 'its share', 'processor time, of one core'],
      slots.found.map((one) => [
        `${one.slots} slot${one.slots === 1 ? '' : 's'}`,
        megabytes(one.residentMb),
        megabytes(one.shareMb),
        `${(100 * one.cpuShare).toFixed(1)} %`,
      ]),
    ),
    `Resident memory with ${SLOTS[1]} slots over that with ${SLOTS[0]}: ${judged(slots.ratio)}. Measured over ${slots.seconds} s.\n`,
  ].join('\n');
}
