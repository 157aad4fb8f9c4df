import fc from 'fast-check';
import { type Command, type Model, steps } from './commands';
import { Round } from './round';
import { World } from './world';

const RUNS = Number(process.env.MACHINE_RUNS ?? 15);
const SEED = Number(process.env.MACHINE_SEED ?? Date.now() % 2 ** 31);
/** The longest that one round may take before it counts as stuck. */
const ROUND_MS = 90_000;
const JITTER_MS = 8;

/**
 * Any order of what callers, tasks, workers, Redis and time may do, with real processes: after each step, and once
 * everything has settled, every promise holds.
 */
describe('the machine', () => {
  let world: World;
  beforeAll(async () => {
    world = await World.start();
  });
  afterAll(() => world.stop());

  it(
    `finds no contradiction in ${RUNS} rounds (MACHINE_SEED=${SEED})`,
    async () => {
      let rounds = 0;
      const property = fc.asyncProperty(
        fc.commands(steps, { maxCommands: 14, size: 'max' }),
        fc.infiniteStream(fc.double({ min: 0, max: 1, noNaN: true, noDefaultInfinity: true })),
        async (commands: Iterable<Command>, random) => {
          rounds++;
          world.jitter(() => random.next().value as number, JITTER_MS);
          const round = new Round(world);
          const model: Model = { jobs: 0 };
          try {
            await fc.asyncModelRun(() => ({ model, real: round }), commands);
            await round.finish();
          } catch (error) {
            process.stderr.write(
              `round ${rounds}: ${(error as Error).message}\nsteps:\n  ${[...commands].join('\n  ')}\n\n`,
            );
            throw error;
          }
          if (rounds % 25 === 0) process.stderr.write(`${rounds} of ${RUNS} rounds\n`);
        },
      );
      // A failure is shown as it was found: a smaller example may depend on the very same milliseconds.
      await fc.assert(property, { numRuns: RUNS, seed: SEED, endOnFailure: true });
    },
    60_000 + RUNS * ROUND_MS,
  );
});
