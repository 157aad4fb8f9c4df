import { eventually } from '../support/eventually';
import { type Row } from '../support/test-database';
import { isAlive } from '../support/test-system';
import { type World } from './world';

/** What a caller was told in answer to its cancel. */
type Told = { status: number; key: string | undefined; completedAt: string | null; neverStarted: boolean };
type JobRow = Row & { id: string; error_code: string | null; scenarios: { pid: number }[] };

const TERMINAL = ['completed', 'failed', 'cancelled'];

/** One job of a round, with everything that was ever seen of it and said about it. */
export class TrackedJob {
  readonly told: Told[] = [];
  /** Runs that the round itself asked for, by telling a task to try again. */
  retries = 0;
  /** How the row looked when the job was first seen to have ended. */
  final: string | undefined;

  constructor(readonly id: string) {}

  get cancelled(): boolean {
    return this.told.some(({ status }) => status === 200);
  }
}

/** One round of the machine: some jobs in a world that outlives the round, and what must hold for them. */
export class Round {
  readonly jobs: TrackedJob[] = [];
  /** Whether something was done that may cut a run short through no fault of its job. */
  disturbed = false;
  /** Jobs with a task that computes without yielding. */
  readonly spinning = new Set<TrackedJob>();

  constructor(readonly world: World) {}

  job(which: number): TrackedJob {
    return this.jobs[which % this.jobs.length]!;
  }

  async create(): Promise<void> {
    const { id } = await this.world.system.create('puppet');
    this.jobs.push(new TrackedJob(id));
  }

  async cancel(job: TrackedJob, key?: string): Promise<void> {
    const { status, body } = await this.world.system.cancel(job.id, key ? { 'idempotency-key': key } : {});
    if (status !== 200 && status !== 400) throw new Error(`cancel of ${job.id} answered ${status}`);
    job.told.push({ status, key, completedAt: body.completed_at, neverStarted: body.started_at === null });
  }

  /** Throws if anything that must always hold does not. */
  async check(): Promise<void> {
    const rows = await this.rows();
    for (const job of this.jobs) {
      const row = rows.get(job.id);
      if (!row) throw new Error(`job ${job.id} is gone`);
      const fault = this.faultOf(job, row);
      if (fault) {
        throw new Error(`${fault}\n  row: ${JSON.stringify(row)}\n  told: ${JSON.stringify(job.told)}`);
      }
    }
    const complaints = this.world.complaints();
    if (complaints.length > 0) throw new Error(`unexpected errors: ${complaints.join('\n')}`);
  }

  private faultOf(job: TrackedJob, row: JobRow): string | undefined {
    const ended = TERMINAL.includes(row.status);
    const looks = JSON.stringify([row.status, row.completed_at, row.error_code, row.cancelled_by]);
    if (job.final !== undefined && job.final !== looks) return `a job that had ended changed, it was ${job.final}`;
    if (ended) job.final = looks;
    if (row.scenarios.length !== (row.status === 'completed' ? 1 : 0)) return 'a scenario without a completed job';
    if (job.told.some(({ status }) => status === 400) && !ended) return 'a cancel was refused that was due';
    const won = job.told.filter(({ status }) => status === 200);
    if (new Set(won.map(({ key }) => key ?? Symbol())).size > 1) return 'two requests cancelled the same job';
    for (const { completedAt, neverStarted } of won) {
      if (row.status !== 'cancelled') return `the caller had a 200, and the job is ${row.status}`;
      if (row.completed_at?.toISOString() !== completedAt) return 'the answer said another time';
      if (neverStarted && (row.attempt > 0 || this.world.puppets.of(job.id).length > 0))
        return 'it began after its cancel';
    }
    const [scenario] = row.scenarios;
    if (scenario && this.runOf(scenario.pid) !== row.run_id) return 'the result of an earlier run was accepted';
    if (!this.disturbed && row.stopped_how === 'worker_lost') return 'a run was taken for lost, whose worker lives';
    if (!this.disturbed && row.attempt > 1 + job.retries) return 'a run was cut short without a reason';
    return undefined;
  }

  private runOf(taskPid: number): unknown {
    const logs = this.world.system.workers.flatMap((worker) => worker.logs);
    return logs.findLast((line) => line.msg === 'run began' && line.taskPid === taskPid)?.runId;
  }

  private async rows(): Promise<Map<string, JobRow>> {
    const { rows } = await this.world.system.pool.query<JobRow>(
      `SELECT j.*, COALESCE((SELECT json_agg(s.content) FROM scenarios s WHERE s.job_id = j.id), '[]') AS scenarios
       FROM scenario_jobs j WHERE j.id = ANY($1)`,
      [this.jobs.map(({ id }) => id)],
    );
    return new Map(rows.map((row) => [row.id, row]));
  }

  /** Heals the world, and waits until every job has ended as it was told to and every process is dead. */
  async finish(): Promise<void> {
    const { world } = this;
    await world.heal();
    for (const job of this.jobs) {
      // Tasks of cancelled jobs must die without being told to.
      if (!job.cancelled) world.puppets.tellFromNowOn(job.id, 'complete');
    }
    await eventually('every job has ended, and every process', async () => {
      const rows = await this.rows();
      for (const job of this.jobs) await this.endOf(job, rows.get(job.id)!);
      return true;
    });
    await this.check();
  }

  private async endOf(job: TrackedJob, row: JobRow): Promise<void> {
    const alive = this.world.puppets.of(job.id).filter(({ pid }) => isAlive(pid));
    if (!TERMINAL.includes(row.status)) {
      // A task that computes without yielding hears nothing: only a cancel ends it.
      if (alive.length > 0 && this.spinning.has(job)) await this.cancel(job);
      throw new Error(`job ${job.id} is ${row.status}`);
    }
    if (alive.length > 0) throw new Error(`process ${alive[0]!.pid} of ${row.status} job ${job.id} lives`);
    if (row.status === 'cancelled' && row.run_id && !row.stopped_at) throw new Error(`${job.id} is not confirmed`);
  }
}
