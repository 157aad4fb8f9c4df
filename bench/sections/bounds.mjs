// bounds: how long after its cancel each kind of task is dead, with and without the message to the worker.
import { randomBytes } from 'node:crypto';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { root } from '../../scripts/prepare.mjs';
import { between, checkStopped, JOBS, send, taskOf } from '../jobs.mjs';
import { openSite } from '../site.mjs';
import { figureOf, takeTurns } from '../statistics.mjs';
import { isMet, ranged, table } from '../text.mjs';

const require = createRequire(import.meta.url);
const PATIENCE_MS = 60_000;
const ROUNDS = 5;
/** Allowance for the machine to get round to a process that is due to die. */
const SLACK_MS = 500;

/** Species of test/support/zoo.mjs: how each ends, and the settings whose sum is its bound. */
const SPECIES = [
  { name: 'cooperative', says: 'heeds its signal', how: 'graceful', bound: [] },
  { name: 'tidy', says: 'heeds it, and cleans up for 50 ms', how: 'graceful', bound: [50] },
  { name: 'spin', says: 'computes without yielding', how: 'terminated', bound: ['STOP_ACK_MS'] },
  { name: 'blocked', says: 'blocks in a system call', how: 'terminated', bound: ['STOP_ACK_MS'] },
  {
    name: 'stubbornSpin',
    says: 'computes, and ignores SIGTERM',
    how: 'killed',
    bound: ['STOP_ACK_MS', 'STOP_KILL_MS'],
  },
  { name: 'deaf', says: 'ignores its signal', how: 'terminated', bound: ['STOP_ACK_MS', 'STOP_GRACE_MS'] },
  {
    name: 'parent',
    says: 'ignores it, and has a child that ignores SIGTERM',
    how: 'terminated',
    bound: ['STOP_ACK_MS', 'STOP_GRACE_MS', 'STOP_KILL_MS'],
  },
  {
    name: 'stubborn',
    says: 'ignores its signal and SIGTERM',
    how: 'killed',
    bound: ['STOP_ACK_MS', 'STOP_GRACE_MS', 'STOP_KILL_MS'],
  },
];

export const about = `Time from when the request is sent until nothing of the task's process group is alive, for every kind of task, with
the default settings. The bound is the sum of the settings named. Without the message, the worker learns of the cancel only by
its poll, and \`CANCEL_POLL_MS\` is added. A task that acknowledges does so at once, not after the whole of \`STOP_ACK_MS\`;
where that is part of its bound, it is dead before the bound. Each bound is two goals, one with the message and one without.
A missed one is marked **beyond its bound**: the longest round took more than ${SLACK_MS} ms longer than the bound. A full run has
${ROUNDS} rounds.`;

export async function measure({ stage, quick, say }) {
  const species = quick ? SPECIES.filter(({ bound }) => bound.length < 2) : SPECIES;
  const site = await openSite(stage, 'bounds');
  const mute = await stage.startService('api-mute', 'main.api.js', {
    ...site.environment,
    REDIS_URL: await createMuteUser(site, stage.redisUrl),
  });
  const worker = await stage.startService('worker-bounds', 'main.worker.js', {
    ...site.environment,
    SCENARIO_TASK: join(root, 'test/support/zoo.mjs'),
    WORKER_CONCURRENCY: String(species.length),
  });
  const stopAll = (api) => async () =>
    Object.fromEntries(
      await Promise.all(
        species.map(async ({ name, how }) => [name, await stopOne({ ...site, api, worker }, name, how)]),
      ),
    );
  try {
    const sides = { doorbell: stopAll(site.api), poll: stopAll(mute) };
    const measured = await takeTurns(quick ? 1 : ROUNDS, sides, (where) => say(`bounds: ${where}`));
    return resultOf(species, measured);
  } finally {
    await worker.stop();
    await mute.stop();
    await site.close();
  }
}

/** Creates a Redis user who may do everything but publish: the messages of its api to workers are lost. */
async function createMuteUser({ redis }, redisUrl) {
  const url = new URL(redisUrl);
  [url.username, url.password] = ['mute', randomBytes(8).toString('hex')];
  await redis.call('ACL', 'SETUSER', url.username, 'on', `>${url.password}`, '~*', '&*', '+@all', '-publish');
  return url.href;
}

async function stopOne(site, name, how) {
  const { body } = await send(site, 'POST', JOBS, { user_email: 'ada@example.com', prompt: name });
  const pid = await taskOf(site.worker, body.id);
  await sleep(300); // It has printed that it runs, and now does what its kind does.
  const began = process.hrtime.bigint();
  const gone = untilGone(pid);
  const { status } = await send(site, 'DELETE', `${JOBS}/${body.id}`);
  if (status !== 200) throw new Error(`cancel of ${name}: ${status}`);
  const ms = between(began, await gone);
  await checkStopped(site, body.id, how);
  return ms;
}

async function untilGone(pid) {
  const deadline = Date.now() + PATIENCE_MS;
  while (Date.now() < deadline) {
    try {
      process.kill(-pid, 0);
    } catch {
      return process.hrtime.bigint();
    }
    await sleep(2);
  }
  throw new Error(`process group ${pid} is still alive after ${PATIENCE_MS} ms`);
}

function resultOf(species, measured) {
  const { SETTINGS } = require('../../dist/config/settings.js');
  const valueOf = (part) => (typeof part === 'number' ? part : SETTINGS[part].parse(undefined));
  const pollMs = valueOf('CANCEL_POLL_MS');
  return species.map(({ name, says, how, bound }) => {
    const boundMs = bound.map(valueOf).reduce((sum, part) => sum + part, 0);
    const judge = (side, mostMs) => {
      const figure = figureOf(measured[side], name);
      return { ...figure, boundMs: mostMs, longest: { value: figure.max, atMost: mostMs + SLACK_MS } };
    };
    const settings = bound.map((part) => (typeof part === 'number' ? `${part} ms` : `\`${part}\``)).join(' + ');
    return { says, how, settings, doorbell: judge('doorbell', boundMs), poll: judge('poll', boundMs + pollMs) };
  });
}

export function show(result) {
  const cell = ({ longest, ...figure }) => `${ranged(figure)}${isMet(longest) ? '' : ', **beyond its bound**'}`;
  return table(
    [
      'the task',
      'its bound',
      'bound, ms',
      'dead after, ms',
      'without the message: bound, ms',
      'dead after, ms',
      'stopped',
    ],
    result.map(({ says, how, settings, doorbell, poll }) => [
      says,
      settings || 'none of ours',
      doorbell.boundMs || '—',
      cell(doorbell),
      poll.boundMs,
      cell(poll),
      `\`${how}\``,
    ]),
  );
}
