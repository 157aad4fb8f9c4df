// node bench/profile.mjs: where the api's processor time goes while it cancels, and which SQL a cancel sends.
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { prepare, root } from '../scripts/prepare.mjs';
import { cpuSeconds } from './proc.mjs';
import { cancelAll, checkCancelled, makeQueued, openSite } from './site.mjs';
import { Stage } from './stage.mjs';
import { table } from './text.mjs';

const CANCELS = { 1: 3000, 64: 10_000 };
const WARM = 2000;
const MOST = 30;

/** Whose code a file is; the first match counts. Time in Node's own code counts for whoever called it. */
const OWNERS = [
  ['Prisma', /@prisma\/|src\/generated|wasm:|dist\/generated/],
  ['pg', /node_modules\/(pg|postgres)[-/]/],
  ['BullMQ and ioredis', /node_modules\/(bullmq|ioredis|@ioredis|redis|msgpackr|standard-as-callback|denque|cluster)/],
  ['pino', /node_modules\/(pino|sonic-boom|thread-stream|quick-format|safe-stable|on-exit-leak)/],
  ['prom-client', /node_modules\/(prom-client|tdigest|bintrees)/],
  [
    'Fastify and Nest',
    /node_modules\/(@nestjs|fastify|@fastify|avvio|find-my-way|light-my|rxjs|reflect|fast-|secure-json)/,
  ],
  ['the service', /\/dist\//],
];

const say = (line) => console.log(line);
await prepare(say);
const stage = await Stage.open(say);
try {
  const load = stage.startHelper('load', 'load.mjs');
  for (const [concurrency, count] of Object.entries(CANCELS)) await profile(load, Number(concurrency), count);
  await showStatements(load);
} finally {
  await stage.close({ failed: false });
}
process.exit();

async function profile(load, concurrency, count) {
  const file = join(stage.place, `profile-${concurrency}.json`);
  const site = await openSite(stage, `profile-${concurrency}`, {
    nodeFlags: ['--import', join(root, 'bench/profile-hook.mjs')],
    environment: { PROFILE_FILE: file },
  });
  const ids = await makeQueued(site, count + WARM);
  await cancelAll(load, site, site.api, ids.slice(0, WARM), 16);
  const cpu = cpuSeconds(site.api.pid);
  process.kill(site.api.pid, 'SIGUSR2');
  const { perSecond, p50 } = await cancelAll(load, site, site.api, ids.slice(WARM), concurrency);
  const busy = cpuSeconds(site.api.pid) - cpu;
  process.kill(site.api.pid, 'SIGUSR2');
  while (!existsSync(file)) await sleep(50);
  await checkCancelled(site, ids);
  await site.close();
  say(`\nConcurrency ${concurrency}: ${perSecond.toFixed(0)} cancels/s, p50 ${p50.toFixed(2)} ms,`);
  say(`${((busy / count) * 1e6).toFixed(0)} µs of processor time per cancel, on all threads\n`);
  show(samplesOf(JSON.parse(readFileSync(file, 'utf8'))), count);
}

/** The time spent in each place of the code itself, in microseconds, and whose code that is. */
function samplesOf({ nodes, samples, timeDeltas }) {
  const byId = new Map(nodes.map((node) => [node.id, node]));
  for (const node of nodes) for (const child of node.children ?? []) byId.get(child).parent = node;
  const found = new Map();
  for (const [index, id] of samples.entries()) found.set(id, (found.get(id) ?? 0) + timeDeltas[index]);
  return [...found].map(([id, micros]) => ({ micros, node: byId.get(id), owner: ownerOf(byId.get(id)) }));
}

function ownerOf(node) {
  if (/^\((idle|program|garbage collector)\)$/.test(node.callFrame.functionName)) return node.callFrame.functionName;
  for (let one = node; one; one = one.parent) {
    const owner = OWNERS.find(([, pattern]) => pattern.test(one.callFrame.url));
    if (owner) return owner[0];
    if (/node_modules/.test(one.callFrame.url)) return 'other packages';
  }
  return "Node's own";
}

function show(samples, count) {
  const sum = (key) => {
    const sums = new Map();
    for (const sample of samples) sums.set(key(sample), (sums.get(key(sample)) ?? 0) + sample.micros);
    return [...sums].sort((a, b) => b[1] - a[1]);
  };
  const busy = samples.filter(({ owner }) => owner !== '(idle)').reduce((total, { micros }) => total + micros, 0);
  const row = ([name, micros]) => [name, (micros / count).toFixed(1), `${((100 * micros) / busy).toFixed(1)} %`];
  const columns = ['', 'µs per cancel', 'share of busy time'];
  say(table(columns, sum(({ owner }) => owner).map(row)));
  const name = ({ owner, node: { callFrame } }) =>
    `${callFrame.functionName || '(anonymous)'} ${short(callFrame.url)}:${callFrame.lineNumber + 1} (${owner})`;
  say(table(columns, sum(name).slice(0, MOST).map(row)));
}

function short(url) {
  return url.replace(/^.*node_modules\//, '').replace(/^.*\/(dist|src)\//, '$1/');
}

/** Shows the statements that Postgres logs for three cancels, one after the other. */
async function showStatements(load) {
  const site = await openSite(stage, 'statements', { withApi: false });
  await site.pool.query(`ALTER DATABASE statements SET log_statement = 'all'`);
  site.api = await stage.startService('api-statements', 'main.api.js', site.environment);
  const ids = await makeQueued(site, 6);
  await cancelAll(load, site, site.api, ids.slice(0, 3), 1);
  const log = join(stage.place, 'postgres.log');
  const before = readFileSync(log, 'utf8').length;
  await cancelAll(load, site, site.api, ids.slice(3), 1);
  // A statement continues on lines that begin with a tab or a space.
  const lines = readFileSync(log, 'utf8')
    .slice(before)
    .replaceAll(/\s*\n\s+/g, ' ')
    .split('\n');
  say('Statements that three cancels sent to Postgres:\n');
  for (const line of lines.filter((one) => /LOG:/.test(one))) say(`  ${line.replace(/^.*?LOG: */, '')}`);
  await site.close();
}
