// create-get: the other two operations compared to their floors, so that tuning the cancel does not slow them.
import { createMany, getAll, makeQueued, openSite } from '../site.mjs';
import { figureOf, ratioOf, takeTurns } from '../statistics.mjs';
import { judged, ranged, table } from '../text.mjs';

const FULL = { 1: 200, 16: 800, 64: 1200 };
const QUICK = { 1: 60, 16: 150, 64: 300 };
const FIGURES = ['perSecond', 'p50', 'p99'];

export const about = `Creates and gets of the service compared with those of the floor, which inserts the same row, adds the same entry
with BullMQ's own \`Queue.add\`, and selects with the same join. They have no goals; they are measured to notice when work on
cancels makes them slower.`;

export async function measure({ stage, load, rounds, quick, say }) {
  const site = await openSite(stage, 'create-get');
  const floor = await stage.startFloor('floor-create-get', site.environment);
  const ids = await makeQueued(site, quick ? 500 : 1200);
  const operations = {
    create: (server, count, concurrency) => createMany(load, site, server, count, concurrency),
    get: (server, count, concurrency) => getAll(load, site, server, fill(ids, count), concurrency),
  };
  const cells = [];
  for (const [operation, run] of Object.entries(operations)) {
    say(`create-get: ${operation}, warming up`);
    for (const server of [site.api, floor]) await run(server, quick ? 300 : 1000, 16);
    for (const [concurrency, count] of Object.entries(quick ? QUICK : FULL)) {
      const before = await counts(site);
      const side = (server) => () => run(server, count, Number(concurrency));
      const sides = { service: side(site.api), floor: side(floor) };
      const measured = await takeTurns(rounds, sides, (where) =>
        say(`create-get: ${operation}, concurrency ${concurrency}, ${where}`),
      );
      await checkCreated(site, before, operation === 'create' ? 2 * rounds * count : 0);
      cells.push(cellOf(operation, Number(concurrency), count, measured));
    }
  }
  await floor.stop();
  await site.close();
  return { cells };
}

const fill = (ids, count) => Array.from({ length: count }, (_, index) => ids[index % ids.length]);

async function counts({ pool, queue }) {
  const { rows } = await pool.query(`SELECT count(*)::int AS count FROM scenario_jobs WHERE status = 'queued'`);
  return { rows: rows[0].count, entries: await queue.count() };
}

async function checkCreated(site, before, created) {
  const after = await counts(site);
  for (const what of ['rows', 'entries']) {
    const more = after[what] - before[what];
    if (more !== created) throw new Error(`${more} more ${what} than before, expected ${created}`);
  }
}

function cellOf(operation, concurrency, count, { service, floor }) {
  const figures = (measured) => Object.fromEntries(FIGURES.map((figure) => [figure, figureOf(measured, figure)]));
  return {
    operation,
    concurrency,
    requests: count,
    service: figures(service),
    floor: figures(floor),
    ratios: Object.fromEntries(FIGURES.map((figure) => [figure, ratioOf(service, floor, figure)])),
  };
}

export function show({ cells }) {
  return table(
    [
      'operation',
      'concurrency',
      'service, per s',
      'floor, per s',
      'ratio',
      'service p99, ms',
      'floor p99, ms',
      'ratio',
    ],
    cells.map(({ operation, concurrency, service, floor, ratios }) => [
      operation,
      concurrency,
      ranged(service.perSecond),
      ranged(floor.perSecond),
      judged(ratios.perSecond),
      ranged(service.p99),
      ranged(floor.p99),
      judged(ratios.p99),
    ]),
  );
}
