// stop: time from the request to cancel until the task's process group is dead, compared to doing without the service.
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { root } from '../../scripts/prepare.mjs';
import { between, checkStopped, JOBS, send, taskOf } from '../jobs.mjs';
import { cancelAll, makeProcessing, makeQueued, openSite } from '../site.mjs';
import { startBareChild } from '../start-bare-child.mjs';
import { figureOf, ratioOf, takeTurns } from '../statistics.mjs';
import { judged, number, ranged, table } from '../text.mjs';
import { openWatch } from '../watch-group.mjs';

const require = createRequire(import.meta.url);
const TASK = join(root, 'bench/task.mjs');
const SPIN_MS = 1500;
const BEYOND_ACK_MS = 50;

export const about = `Time from when the load generator sends the request until nothing of the task's process group is alive, checked
from outside four times a millisecond. The service and a worker run with their default settings. What it is compared with:

- \`bare child\`: \`child_process.fork\`, from a message that aborts the task's \`AbortController\`; for a task that computes
  without yielding, from a SIGKILL.
- \`floor\`: the hand-written server of the section floor, and a hand-written worker that hears its message, asks Postgres
  whether it is true, and tells its bare child. The service's worker need not ask, because its message is proof of the cancel.
- BullMQ's \`worker.cancelJob\`: from the message. There is no process to end, so the time is until its processor, in the
  worker's own process, has seen the abort and returns. It has no bound either and writes no status, and a processor that does
  not yield never hears of it.`;

export async function measure({ stage, load, quick, say }) {
  const rounds = quick ? 3 : 25;
  const site = await openSite(stage, 'stop');
  site.worker = await stage.startService('worker-stop', 'main.worker.js', {
    ...site.environment,
    SCENARIO_TASK: TASK,
  });
  const watch = openWatch();
  const cancelInService = (prompt, how) => cancelTask({ load, site, watch }, prompt, how);
  const floor = await openFloor(stage, load);
  const inProcess = await openInProcess(stage, site);
  const { STOP_ACK_MS } = require('../../dist/config/settings.js').SETTINGS;
  const ackMs = STOP_ACK_MS.parse(undefined);
  try {
    // Measures servers that have served for a while, not freshly started ones.
    for (const one of [site, floor.site])
      await cancelAll(load, one, one.api, await makeQueued(one, quick ? 200 : 2000), 1);
    for (let warm = 0; warm < 3; warm++) {
      await cancelInService('heeds its signal', 'graceful');
      await floor.cancel(watch);
    }
    const cooperative = await takeTurns(
      rounds,
      {
        service: () => cancelInService('heeds its signal', 'graceful'),
        floor: () => floor.cancel(watch),
        bare: () => stopBareChild(watch, 'heeds its signal', (child) => child.send({})),
        pubsub: () => inProcess.cancel('pubsub', 0),
        relay: () => inProcess.cancel('relay', 0),
      },
      (where) => say(`stop: cooperative, ${where}`),
    );
    const cpuBound = await takeTurns(
      quick ? 2 : 7,
      {
        service: () => cancelInService('[spin]', 'terminated'),
        bare: () => stopBareChild(watch, '[spin]', (child) => child.kill('SIGKILL')),
      },
      (where) => say(`stop: CPU-bound, ${where}`),
    );
    say('stop: CPU-bound, in process');
    const never = {};
    for (const means of ['pubsub', 'relay']) never[means] = await inProcess.cancel(means, SPIN_MS);
    return resultOf(cooperative, cpuBound, never, ackMs);
  } finally {
    await watch.close();
    await inProcess.close();
    await floor.site.close();
    await site.worker.stop();
    await site.close();
  }
}

/** Creates a job, waits until its task's code runs, and cancels it. */
async function cancelTask({ load, site, watch }, prompt, how) {
  const { body } = await send(site, 'POST', JOBS, { user_email: 'ada@example.com', prompt });
  const measured = await cancel({ load, site, watch }, body.id, await taskOf(site.worker, body.id));
  await checkStopped(site, body.id, how);
  return measured;
}

/** Cancels a job, and waits until the process group of its task is gone. */
async function cancel({ load, site, watch }, jobId, pid) {
  const gone = watch.untilGone(pid);
  const { port } = site.api;
  const answer = await load.ask('sendOne', { port, key: site.key, method: 'DELETE', path: `${JOBS}/${jobId}` });
  if (answer.status !== 200 || JSON.parse(answer.body).status !== 'cancelled') {
    throw new Error(`cancel: ${answer.status} ${answer.body}`);
  }
  const began = BigInt(answer.sentAt);
  return { ms: between(began, await gone), answeredMs: between(began, BigInt(answer.answeredAt)) };
}

async function stopBareChild(watch, prompt, stop) {
  const { child, printed } = startBareChild(prompt);
  await printed;
  const gone = watch.untilGone(child.pid);
  const began = process.hrtime.bigint();
  stop(child);
  return { ms: between(began, await gone) };
}

/** Opens the floor: a hand-written server and worker, with a database of their own. */
async function openFloor(stage, load) {
  const workerId = 'floor';
  const site = await openSite(stage, 'stop-floor', { withApi: false });
  site.api = await stage.startFloor('floor-stop', site.environment);
  const env = { ...site.environment, REDIS_URL: stage.redisUrl, CHANNEL: `${site.prefix}:cancel:${workerId}` };
  const worker = stage.startHelper('floor-worker', 'floor-worker.mjs', { env });
  await worker.ask('listen');
  return {
    site,
    cancel: async (watch) => {
      const [jobId] = await makeProcessing(site, 1, workerId);
      return cancel({ load, site, watch }, jobId, await worker.ask('start', { jobId, prompt: 'heeds its signal' }));
    },
  };
}

async function openInProcess(stage, { name }) {
  const { Relay } = await import('bullmq');
  const { Redis } = await import('ioredis');
  const env = { REDIS_URL: stage.redisUrl, QUEUE_PREFIX: `{bench-${name}-in-process}` };
  const helper = stage.startHelper('in-process', 'in-process.mjs', { env });
  await helper.ask('listen');
  const redis = new Redis(stage.redisUrl, { maxRetriesPerRequest: null });
  const relayRedis = redis.duplicate();
  const relay = new Relay({ connection: relayRedis, prefix: env.QUEUE_PREFIX });
  await relay.waitUntilReady();
  const send = {
    pubsub: (id) => redis.publish(`${env.QUEUE_PREFIX}:cancel`, id),
    relay: (id) => relay.publish('cancel', id),
  };
  const cancel = async (means, spinMs) => {
    const id = await helper.ask('start', { spinMs });
    const began = process.hrtime.bigint();
    await send[means](id);
    const { at, aborted } = await helper.ask('end', id);
    return { ms: between(began, BigInt(at)), aborted };
  };
  const close = async () => {
    await relay.close();
    for (const connection of [redis, relayRedis]) connection.disconnect();
  };
  return { cancel, close };
}

function resultOf(cooperative, cpuBound, never, ackMs) {
  const afterAnswer = cooperative.service.map(({ ms, answeredMs }) => ({ ms: ms - answeredMs }));
  const beyondAck = cpuBound.service.map(({ ms }) => ({ ms: ms - ackMs }));
  return {
    rounds: { cooperative: cooperative.service.length, cpuBound: cpuBound.service.length },
    ackMs,
    spinMs: SPIN_MS,
    cooperative: Object.fromEntries(Object.entries(cooperative).map(([side, all]) => [side, figureOf(all, 'ms')])),
    answered: figureOf(cooperative.service, 'answeredMs'),
    ratio: { ...ratioOf(cooperative.service, cooperative.bare, 'ms'), atMost: 1.5 },
    floorRatio: ratioOf(cooperative.floor, cooperative.bare, 'ms'),
    overFloor: ratioOf(cooperative.service, cooperative.floor, 'ms'),
    afterAnswer: ratioOf(afterAnswer, cooperative.bare, 'ms'),
    cpuBound: { service: figureOf(cpuBound.service, 'ms'), bare: figureOf(cpuBound.bare, 'ms') },
    beyondAck: { ...figureOf(beyondAck, 'ms'), atMost: BEYOND_ACK_MS },
    never,
  };
}

export function show({
  rounds,
  ackMs,
  spinMs,
  cooperative,
  answered,
  afterAnswer,
  cpuBound,
  beyondAck,
  never,
  ...ratios
}) {
  const inProcess = ({ ms, aborted }) =>
    aborted
      ? `${number(ms)} ms`
      : `never: it computed for its full ${spinMs} ms, and even then its signal was not aborted`;
  const rows = [
    ['the service', `${ranged(cooperative.service)} ms`, `${ranged(cpuBound.service)} ms`],
    ['floor', `${ranged(cooperative.floor)} ms`, '—'],
    ['bare child', `${ranged(cooperative.bare)} ms`, `${ranged(cpuBound.bare)} ms, by SIGKILL at once`],
    ['`cancelJob` over publish/subscribe', `${ranged(cooperative.pubsub)} ms, no process`, inProcess(never.pubsub)],
    ["`cancelJob` over BullMQ's Relay", `${ranged(cooperative.relay)} ms, no process`, inProcess(never.relay)],
  ];
  return [
    `${rounds.cooperative} rounds; ${rounds.cpuBound} for the task that computes.\n`,
    table(['', 'cooperative task', 'task that computes without yielding'], rows),
    `- cooperative task, the service over the bare child: ${judged(ratios.ratio)}`,
    `- cooperative task, the floor over the bare child, which is the cost of deciding before delivering: ${judged(ratios.floorRatio)}`,
    `- cooperative task, the service over the floor: ${judged(ratios.overFloor)}`,
    `- task that computes, time beyond the acknowledgement window of ${ackMs} ms, in ms: ${judged(beyondAck)}`,
    `- cooperative task, time until the service has answered, with the decision committed: ${ranged(answered)} ms`,
    `- time from that answer until the process is gone, over the bare child's whole time: ${judged(afterAnswer)}\n`,
  ].join('\n');
}
