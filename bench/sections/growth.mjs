// growth: whether a cancel takes longer when the queue, the table, the workers or the keys have grown.
import { fillKeys, fillQueue, fillTable, fillUnseen, settle } from '../fill.mjs';
import { cancelAll, checkCancelled, makeProcessing, makeQueued, openSite, scriptsOf } from '../site.mjs';
import { figureOf, latenciesOf, ratioOf, takeTurns } from '../statistics.mjs';
import { judged, ranged, table } from '../text.mjs';

const GOAL = 1.2;
const FULL = {
  rounds: 19,
  cancels: 80,
  base: { depth: 1000, rows: 10_000, unseen: 100, keys: 10, workers: 1 },
  grown: [{ depth: 100_000 }, { depth: 1_000_000 }, { rows: 5_000_000 }, { unseen: 200_000 }, { keys: 10_000 }],
  workers: 200,
};
const QUICK = {
  rounds: 5,
  cancels: 30,
  base: { depth: 1000, rows: 10_000, unseen: 100, keys: 10, workers: 1 },
  grown: [{ depth: 20_000 }, { rows: 100_000 }, { unseen: 20_000 }, { keys: 1000 }],
  workers: 20,
};
const WORDS = {
  depth: 'entries in the queue',
  rows: 'rows in the table',
  unseen: 'jobs unknown to the statistics',
  keys: 'API keys',
  workers: 'workers',
};

export const about = `Latency of a cancel at concurrency 1 when one thing has grown, compared with that of a small base in the same
rounds. No answer waits for Redis, but removing the entry is where a deep queue would cost time, so the mean time Redis takes
for that is added to the latency of queued jobs. Each size has its own database, queue and api, all on the same Postgres and
Redis.

\`the base again\` is a second base: any difference from the first is noise. The jobs cancelled for \`workers\` are ones that
simulated workers are processing. Each worker has a subscription and a connection to Postgres, which it asks every two seconds
as real ones do. \`jobs unknown to the statistics\` were added to the table after Postgres last analysed it, as after a burst:
its planner thinks that few jobs are waiting.

![latency over growth](growth.svg)`;

export async function measure(bench) {
  const sizes = bench.quick ? QUICK : FULL;
  const sites = await openSites(bench, sizes);
  const measured = await measureSites(bench, sites, sizes);
  const [base, ...others] = sites;
  const cells = others.map((site) => cellOf(site, measured[base.name], measured[site.name], base.size));
  for (const site of others) await site.close();
  cells.push(await measureWorkers(bench, base, sizes));
  await base.close();
  return { cancels: sizes.cancels, rounds: sizes.rounds, goal: GOAL, cells, curves: curvesOf(cells) };
}

/** Opens the base, the base again, and one site for each thing that has grown. */
async function openSites({ stage, say }, { base, grown, cancels }) {
  say('growth: filling tables and queues');
  const wanted = [{}, {}, ...grown].map((change, index) => ({ change, size: { ...base, ...change }, index }));
  const sites = await Promise.all(wanted.map(({ index }) => openSite(stage, `growth-${index}`)));
  await Promise.all(
    wanted.map(async ({ change, size, index }) => {
      const site = Object.assign(sites[index], { change, size });
      await fillTable(site.pool, site.workspaceId, size.rows);
      await fillKeys(site.pool, size.keys - 1);
      await fillQueue(site.queue, size.depth - cancels);
      await fillUnseen(site, size.unseen);
      if (size.depth > base.depth || size.rows > base.rows) say(`growth: filled ${JSON.stringify(change)}`);
    }),
  );
  await settle(sites[0]);
  // The real sizes, not those asked for.
  for (const site of sites)
    site.size = { ...site.size, ...(await sizeOf(site)), depth: (await site.queue.count()) + cancels };
  return sites;
}

async function sizeOf({ pool }) {
  const { rows } = await pool.query(
    `SELECT (SELECT count(*) FROM scenario_jobs)::int AS rows, (SELECT count(*) FROM api_keys)::int AS keys`,
  );
  return rows[0];
}

async function measureSites({ load, say, quick }, sites, { rounds, cancels }) {
  for (const site of sites) {
    say(`growth: warming up ${site.name}`);
    for (let left = quick ? 300 : 1000; left > 0; left -= 100)
      await cancelAll(load, site, site.api, await makeQueued(site, 100), 16);
  }
  const side = (site) => async () => {
    const ids = await makeQueued(site, cancels);
    const before = await scriptsOf(site);
    const { milliseconds } = await cancelAll(load, site, site.api, ids, 1);
    await checkCancelled(site, ids);
    const after = await scriptsOf(site);
    const removal = (after.ms - before.ms) / (after.calls - before.calls);
    return latenciesOf(milliseconds.map((one) => one + removal));
  };
  const sides = Object.fromEntries(sites.map((site) => [site.name, side(site)]));
  return takeTurns(rounds, sides, (where) => say(`growth: queued, ${where}`));
}

async function measureWorkers({ stage, load, say }, site, { rounds, cancels, base, workers }) {
  const simulator = stage.startHelper('workers', 'workers.mjs');
  let polls = 0;
  const side = (count) => async () => {
    const { databaseUrl, prefix } = site;
    await simulator.ask('connect', { count, databaseUrl, redisUrl: stage.redisUrl, prefix });
    const workerIds = Array.from({ length: count }, (_, index) => `simulated-${index}`);
    const ids = await makeProcessing(site, count * Math.ceil((2 * cancels) / count), ...workerIds);
    const measured = await cancelAll(load, site, site.api, ids, 1);
    await checkCancelled(site, ids);
    const asked = await simulator.ask('disconnect');
    if (count === workers) polls += asked;
    return measured;
  };
  const sides = { few: side(base.workers), many: side(workers) };
  const { few, many } = await takeTurns(Math.ceil(rounds / 3), sides, (where) =>
    say(`growth: ${workers} workers, ${where}`),
  );
  return { ...cellOf({ change: { workers }, size: { workers } }, few, many, base), polls };
}

function cellOf({ change, size }, base, grown, baseSize) {
  const [what] = Object.keys(change);
  return {
    what: what ?? 'again',
    from: what && baseSize[what],
    to: what && size[what],
    base: { p50: figureOf(base, 'p50'), p99: figureOf(base, 'p99') },
    grown: { p50: figureOf(grown, 'p50'), p99: figureOf(grown, 'p99') },
    ratios: {
      p50: { ...ratioOf(grown, base, 'p50'), ...(what && { atMost: GOAL }) },
      p99: ratioOf(grown, base, 'p99'),
    },
  };
}

/** One curve for each thing that has grown; it begins at the base, where the ratio is 1 by definition. */
function curvesOf(cells) {
  const start = { factor: 1, ratio: { value: 1, min: 1, max: 1 } };
  return Object.entries(WORDS).map(([what, name]) => ({
    name,
    points: [
      start,
      ...cells
        .filter((cell) => cell.what === what)
        // Without its goal, which is counted where it is judged.
        .map(({ from, to, ratios: { p50 } }) => ({
          factor: to / from,
          ratio: { value: p50.value, min: p50.min, max: p50.max },
        })),
    ],
  }));
}

export function show({ cells, cancels, rounds }) {
  const rows = cells.map(({ what, from, to, base, grown, ratios }) => [
    what === 'again' ? 'the base again' : `${WORDS[what]}: ${grouped(from)} → ${grouped(to)}`,
    ranged(base.p50),
    ranged(grown.p50),
    judged(ratios.p50),
    judged(ratios.p99),
  ]);
  const columns = ['what has grown', 'p50 of the base, ms', 'p50 when grown, ms', 'ratio of p50', 'ratio of p99'];
  return `${rounds} rounds of ${cancels} cancels; for the workers a third as many rounds, each of at least twice as many cancels.\n\n${table(columns, rows)}`;
}

const grouped = (count) => String(count).replaceAll(/\B(?=(\d{3})+$)/g, ' ');
