// floor: how close the service's cancels come to those of a hand-written server with the same effects.
import { setTimeout as sleep } from 'node:timers/promises';
import { cancelAll, checkCancelled, checkHeard, listen, makeProcessing, makeQueued, openSite } from '../site.mjs';
import { figureOf, ratioOf, takeTurns } from '../statistics.mjs';
import { judged, number, percent, ranged, table } from '../text.mjs';

/** How many cancels a round has, by concurrency. */
const FULL = { 1: 450, 16: 1000, 64: 2000 };
const QUICK = { 1: 80, 16: 200, 64: 400 };
/** How many cancels at the beginning of each turn are not measured: see `about`. */
const LEAD = { 1: 50, 16: 200, 64: 200 };
/** By then the servers have noticed that their connections are gone. */
const NOTICE_MS = 50;
/** One at a time, both sides do nearly the same and chance would decide, so there are this many times the rounds. */
const MORE_ROUNDS_AT_1 = 5;
const QUICK_MORE_ROUNDS_AT_1 = 2;
/** Warm-up turns and the cancels in each. Code compiled for queued jobs also serves processing ones. */
const WARM_UP = { cancels: 2500, turns: { queued: 8, processing: 2 } };
const QUICK_WARM_UP = { cancels: 500, turns: { queued: 1, processing: 1 } };
/** Long enough for a pool to close its connections, and for V8 to give back memory and compiled code. */
const PAUSE_MS = 12_000;
const AFTER_PAUSE = { rounds: 5, count: 100 };

export const about = `Cancels of the service compared with those of the floor, the hand-written \`bench/floor-server.mjs\`. The floor is
node:http, pg with prepared statements and BullMQ's own script, and nothing else: no validation, no log, no metrics, no error
handling. The service does three things that the floor does not: it looks up the key in the statement that cancels, shares
commits, and answers without waiting for Redis. Both run with the same Node flags.

The worker of the processing jobs is simulated, and reads its messages between the rounds, because a real one would be on
another machine. Both sides get new connections to Postgres in every round: two connections with the same plans can differ by
a tenth of a cancel for as long as they live. At concurrency 1 there are ${MORE_ROUNDS_AT_1} times as many rounds (${QUICK_MORE_ROUNDS_AT_1} times as many in a
quick run).

The first ${LEAD[1]} cancels of a turn (${LEAD[16]} at the other concurrencies) are not measured: the new connections have no plans yet, and
each side has gone cold during the other's turn. These few in a hundred, slow for that reason alone, would decide the p99. What
a pause costs is measured separately: a full run ends with the first cancels after pauses of ${PAUSE_MS / 1000} s in which neither side
received any request, since an API for cancelling jobs has many such pauses.`;

export async function measure({ stage, load, rounds, quick, say }) {
  const site = await openSite(stage, 'floor');
  const floor = await stage.startFloor('floor', site.environment);
  const listener = await listen(site);
  let told = 0;
  const make = {
    queued: (count) => makeQueued(site, count),
    processing: (count) => {
      told += count;
      return makeProcessing(site, count, listener.workerId);
    },
  };
  const roundsAt1 = rounds * (quick ? QUICK_MORE_ROUNDS_AT_1 : MORE_ROUNDS_AT_1);
  const cells = [];
  for (const from of ['queued', 'processing']) {
    say(`floor: ${from}, warming up`);
    const { cancels, turns } = quick ? QUICK_WARM_UP : WARM_UP;
    await warmUp({ load, site, floor, make: make[from], cancels, turns: turns[from] });
    for (const [atOnce, count] of Object.entries(quick ? QUICK : FULL)) {
      const concurrency = Number(atOnce);
      const measured = await cancelInTurns({
        load,
        site,
        floor,
        make: make[from],
        rounds: concurrency === 1 ? roundsAt1 : rounds,
        count,
        lead: LEAD[concurrency],
        concurrency,
        before: async () => {
          listener.resume();
          await endConnections(site);
          listener.pause();
        },
        say: (where) => say(`floor: ${from}, concurrency ${concurrency}, ${where}`),
      });
      if (from === 'processing') await checkHeard(listener, told);
      cells.push(cellOf(from, concurrency, count, measured));
    }
  }
  const afterPause = quick ? null : await measureAfterPause({ load, site, floor, make: make.queued, say });
  listener.close();
  await floor.stop();
  await site.close();
  return { cells, afterPause };
}

/**
 * Warms both sides up with two cancels at a time, which are not yet put into one batch, and with enough of them that
 * both sides' code is compiled as after hours of service: while V8 compiles in the background, it takes one of the two
 * cores for milliseconds. Connections are ended as well, because V8 throws away what it compiled without having seen
 * that happen.
 */
async function warmUp({ load, site, floor, make, turns, cancels }) {
  for (let turn = 0; turn < turns; turn++) {
    await endConnections(site);
    for (const server of [site.api, floor]) await cancelAll(load, site, server, await make(cancels), 2);
  }
}

/** Ends both sides' connections to Postgres, so that each makes new ones. */
async function endConnections({ pool }) {
  const others = `FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`;
  await pool.query(`SELECT pg_terminate_backend(pid) ${others}`);
  while ((await pool.query(`SELECT ${others} LIMIT 1`)).rowCount > 0) await sleep(1);
  await sleep(NOTICE_MS);
}

/** In each round each side cancels `count` jobs, after `lead` that are not measured; all must then be cancelled. */
async function cancelInTurns({ load, site, floor, make, rounds, count, lead = 0, concurrency, before, say }) {
  const each = lead + count;
  const ids = await make(2 * rounds * each);
  const run = (server, side) => (round) => {
    const first = (2 * round + side) * each;
    return cancelAll(load, site, server, ids.slice(first, first + each), concurrency, lead);
  };
  const measured = await takeTurns(rounds, { service: run(site.api, 0), floor: run(floor, 1) }, say, before);
  await checkCancelled(site, ids);
  return measured;
}

async function measureAfterPause({ say, ...sides }) {
  const measured = await cancelInTurns({
    ...sides,
    ...AFTER_PAUSE,
    concurrency: 1,
    before: () => sleep(PAUSE_MS),
    say: (where) => say(`floor: after a pause, ${where}`),
  });
  return {
    cancels: AFTER_PAUSE.count,
    rounds: AFTER_PAUSE.rounds,
    service: figureOf(measured.service, 'p50'),
    floor: figureOf(measured.floor, 'p50'),
    ratio: ratioOf(measured.service, measured.floor, 'p50'),
  };
}

function cellOf(from, concurrency, count, { service, floor }) {
  const figures = (measured) => ({
    perSecond: figureOf(measured, 'perSecond'),
    p50: figureOf(measured, 'p50'),
    p99: figureOf(measured, 'p99'),
    generatorCpu: figureOf(measured, 'generatorCpu'),
  });
  return {
    from,
    concurrency,
    cancels: count,
    service: figures(service),
    floor: figures(floor),
    ratios: {
      perSecond: { ...ratioOf(service, floor, 'perSecond'), atLeast: concurrency === 1 ? 0.9 : 1 },
      p50: ratioOf(service, floor, 'p50'),
      p99: { ...ratioOf(service, floor, 'p99'), atMost: 1.2 },
    },
  };
}

export function show({ cells, afterPause }) {
  const rows = (rest) => cells.map((cell) => [cell.from, cell.concurrency, ...rest(cell)]);
  const sides = (figure, { service, floor }) => [ranged(service[figure]), ranged(floor[figure])];
  return [
    table(
      ['job', 'concurrency', 'service, cancels/s', 'floor, cancels/s', 'ratio', 'load generator, share of one core'],
      rows((cell) => [
        ...sides('perSecond', cell),
        judged(cell.ratios.perSecond),
        percent(cell.service.generatorCpu.value),
      ]),
    ),
    table(
      [
        'job',
        'concurrency',
        'service p99, ms',
        'floor p99, ms',
        'ratio of p99',
        "median of the rounds' ratios",
        'ratio of p50',
      ],
      rows((cell) => [
        ...sides('p99', cell),
        judged(cell.ratios.p99),
        number(cell.ratios.p99.medianOfRounds),
        judged(cell.ratios.p50),
      ]),
    ),
    ...(afterPause ? [showAfterPause(afterPause)] : []),
  ].join('\n');
}

function showAfterPause({ cancels, rounds, service, floor, ratio }) {
  return table(
    [`first ${cancels} cancels after a pause, ${rounds} times`, 'service p50, ms', 'floor p50, ms', 'ratio of p50'],
    [['queued, concurrency 1', ranged(service), ranged(floor), judged(ratio)]],
  );
}
