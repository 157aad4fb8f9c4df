import fc from 'fast-check';
import { ORDERS, type Order, type Puppet } from './puppets';
import { type Round, type TrackedJob } from './round';

/** What the machine knows before anything runs: how many jobs there will be. */
export type Model = { jobs: number };
export type Command = fc.AsyncCommand<Model, Round>;

/** How long a step waits for something that may or may not happen. */
const MOMENT_MS = 400;

/** A step: its description, which a failure shows, and what it does. After each step every promise must hold. */
class Step implements Command {
  constructor(
    private readonly words: string,
    private readonly work: (round: Round) => unknown,
    private readonly jobs: 'creates' | 'needs' | 'none' = 'none',
  ) {}

  check({ jobs }: Model): boolean {
    return this.jobs !== 'needs' || jobs > 0;
  }

  async run(model: Model, round: Round): Promise<void> {
    if (this.jobs === 'creates') model.jobs++;
    await this.work(round);
    await round.check();
  }

  toString(): string {
    return this.words;
  }
}

const onJob = (which: number, words: string, work: (round: Round, job: TrackedJob) => Promise<unknown>) =>
  new Step(`${words} (job ${which})`, (round) => work(round, round.job(which)), 'needs');

/** One of the tasks that run the job, or that ran it and have not noticed that it is over. */
function puppetOf(round: Round, job: TrackedJob, which: number): Puppet | undefined {
  const alive = round.world.puppets.alive(job.id);
  return alive[which % alive.length];
}

function tell(round: Round, job: TrackedJob, order: Order, which: number): void {
  const puppet = puppetOf(round, job, which);
  if (!puppet) return;
  if (order === 'retry') job.retries++;
  if (order === 'spin') round.spinning.add(job);
  round.world.puppets.tell(puppet, order);
}

const disturbing = (words: string, work: (round: Round) => unknown) =>
  new Step(words, (round) => {
    round.disturbed = true;
    return work(round);
  });

const job = fc.nat(3);
const which = fc.nat(1);
const key = fc.option(fc.constantFrom('a', 'b'), { nil: undefined });
const order = fc.constantFrom(...ORDERS);
/** About as long as a result takes from the task to the row. */
const moment = fc.nat(80);

const create = fc.constant(new Step('create', (round) => round.create(), 'creates'));
const begin = job.map((j) =>
  onJob(j, 'wait until it runs', (round, { id }) =>
    round.world.untilOrLonger(MOMENT_MS, () => round.world.puppets.alive(id).length > 0),
  ),
);
const command = fc.tuple(job, order, which).map(([j, o, w]) =>
  onJob(j, `tell it to ${o}`, async (round, tracked) => {
    await round.world.untilOrLonger(MOMENT_MS, () => puppetOf(round, tracked, w) !== undefined);
    tell(round, tracked, o, w);
  }),
);
const cancel = fc
  .tuple(job, key)
  .map(([j, k]) => onJob(j, `cancel with key ${k}`, (round, tracked) => round.cancel(tracked, k)));
const cancelAtOnce = fc
  .tuple(job, fc.array(key, { minLength: 2, maxLength: 4 }))
  .map(([j, keys]) =>
    onJob(j, `cancel with keys ${keys.join()} at once`, (round, tracked) =>
      Promise.all(keys.map((k) => round.cancel(tracked, k))),
    ),
  );
const race = fc.tuple(job, order, which, key, moment).map(([j, o, w, k, ms]) =>
  onJob(j, `tell it to ${o}, and cancel ${ms} ms later`, async (round, tracked) => {
    await round.world.untilOrLonger(MOMENT_MS, () => puppetOf(round, tracked, w) !== undefined);
    tell(round, tracked, o, w);
    await round.world.pass(ms);
    await round.cancel(tracked, k);
  }),
);
const createAndCancel = fc.tuple(moment, key).map(
  ([ms, k]) =>
    new Step(
      `create, and cancel ${ms} ms later`,
      async (round) => {
        await round.create();
        await round.world.pass(ms);
        await round.cancel(round.jobs.at(-1)!, k);
      },
      'creates',
    ),
);
const loseDoorbells = fc
  .boolean()
  .map((lost) => new Step(lost ? 'lose doorbells' : 'doorbells work', (round) => round.world.loseDoorbells(lost)));
const forge = job.map((j) => onJob(j, 'forge a doorbell', (round, { id }) => round.world.forgeDoorbell(id)));
const redeliver = fc.tuple(job, fc.boolean()).map(([j, early]) =>
  onJob(j, `redeliver${early ? ', and let the earlier run complete' : ''}`, async (round, tracked) => {
    round.disturbed = true;
    const { world } = round;
    const earlier = puppetOf(round, tracked, 0);
    const { run_id: runId } = await world.system.row(tracked.id);
    await world.redeliver(tracked.id);
    if (!early || !earlier) return;
    await world.untilTakenOver(tracked.id, runId, MOMENT_MS);
    world.puppets.tell(earlier, 'complete');
  }),
);
const kill = which.map((w) => disturbing(`kill worker ${w}`, (round) => round.world.replaceWorker(w)));
const freeze = fc.tuple(which, fc.constantFrom(300, 2500)).map(([w, ms]) =>
  disturbing(`freeze worker ${w} for ${ms} ms`, async (round) => {
    round.world.freezeWorker(w);
    await round.world.pass(ms);
    round.world.thawWorkers();
  }),
);
const leaveFrozen = which.map((w) => disturbing(`freeze worker ${w}`, (round) => round.world.freezeWorker(w)));
const thaw = fc.constant(new Step('thaw', (round) => round.world.thawWorkers()));
const wipe = fc.constant(disturbing('wipe Redis', (round) => round.world.wipeRedis()));
const pass = fc.constantFrom(20, 150, 600).map((ms) => new Step(`let ${ms} ms pass`, (round) => round.world.pass(ms)));

/** Every step, the common ones more often. */
export const steps: fc.Arbitrary<Command>[] = [
  ...Array<fc.Arbitrary<Command>>(4).fill(create),
  ...Array<fc.Arbitrary<Command>>(4).fill(begin),
  ...Array<fc.Arbitrary<Command>>(4).fill(command),
  ...Array<fc.Arbitrary<Command>>(3).fill(cancel),
  ...Array<fc.Arbitrary<Command>>(5).fill(race),
  ...Array<fc.Arbitrary<Command>>(2).fill(redeliver),
  ...Array<fc.Arbitrary<Command>>(2).fill(loseDoorbells),
  ...Array<fc.Arbitrary<Command>>(4).fill(forge),
  ...[cancelAtOnce, createAndCancel, kill, freeze, leaveFrozen, thaw, wipe, pass, pass],
];
