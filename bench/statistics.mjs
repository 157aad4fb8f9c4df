// Medians, spreads and ratios; and rounds in which the compared sides take turns.

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** The median, the least and the greatest of the rounds. */
export function spread(values) {
  return { value: median(values), min: Math.min(...values), max: Math.max(...values) };
}

/** Throughput and latencies of one measurement: `milliseconds` has a latency for each request. */
export function summarise(milliseconds, elapsed) {
  return { perSecond: (milliseconds.length / elapsed) * 1000, ...latenciesOf(Array.from(milliseconds)) };
}

export function latenciesOf(milliseconds) {
  const sorted = Float64Array.from(milliseconds).sort();
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))];
  return { p50: at(0.5), p99: at(0.99), milliseconds };
}

/**
 * Measures every side in each round, every second round in reverse order, so that whatever else the machine does
 * affects all of them alike. `sides` are functions; returns the measurements of each side, one for each round. `before`
 * runs at the beginning of each round.
 */
export async function takeTurns(rounds, sides, say, before = () => undefined) {
  const measured = Object.fromEntries(Object.keys(sides).map((name) => [name, []]));
  for (let round = 1; round <= rounds; round++) {
    say(`round ${round} of ${rounds}`);
    await before();
    const names = Object.keys(sides);
    for (const name of round % 2 ? names : names.reverse()) measured[name].push(await sides[name](round - 1));
  }
  return measured;
}

/**
 * The figure of `ours` over that of `theirs`, round by round. For p99, the ratio over all rounds, with the median of
 * the rounds.
 */
export function ratioOf(ours, theirs, figure) {
  const rounds = spread(ours.map((one, round) => one[figure] / theirs[round][figure]));
  if (figure !== 'p99') return rounds;
  return { ...rounds, medianOfRounds: rounds.value, value: p99Of(ours) / p99Of(theirs) };
}

/** One figure of one side over the rounds. */
export function figureOf(measured, figure) {
  const rounds = spread(measured.map((one) => one[figure]));
  return figure === 'p99' ? { ...rounds, value: p99Of(measured) } : rounds;
}

/**
 * The p99 of the requests of all rounds together. In a single round it may be the sixth slowest of six hundred, which
 * depends on what else the machine did in that second.
 */
const p99Of = (measured) => latenciesOf(measured.flatMap(({ milliseconds }) => milliseconds)).p99;
