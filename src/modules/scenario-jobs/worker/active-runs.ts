import { randomUUID } from 'node:crypto';
import { Injectable } from '@nestjs/common';
import { type StopReason } from './task-messages';
import { type TaskProcess } from './task-process';

/** At most this many runs that never began are remembered: the newest. */
const MOST_NEVER_BEGUN = 1000;

/** A run that this worker has begun and not yet answered for. */
export class ActiveRun {
  /** Whether Postgres has answered the claim: before that, it may not know the run yet. */
  claimed = false;
  reason: StopReason | undefined;
  /** When the claim was about to be made, by `performance.now()`. */
  readonly began = performance.now();
  /** Never used twice. */
  readonly runId = randomUUID();
  /** Proves that the job was cancelled. Logs and the task have the run's id, but never this. */
  readonly stopToken = randomUUID();
  private process: TaskProcess | undefined;

  constructor(readonly jobId: string) {}

  /** Gives the run its process. */
  attach(process: TaskProcess): void {
    this.process = process;
  }

  /** Resolves once the run no longer has a process. */
  async gone(): Promise<void> {
    await this.process?.gone();
  }

  /**
   * Stops the run; the first reason counts. Returns false if the run is being stopped already, or if its result is
   * there and the reason is only one of time: then the result was in time.
   */
  stop(reason: StopReason): boolean {
    if (this.reason) return false;
    if ((reason === 'timeout' || reason === 'interrupted') && this.process?.hasEnded) return false;
    this.reason = reason;
    this.process?.stop(reason);
    return true;
  }
}

/**
 * The runs of this worker, by run id. BullMQ's own `cancelJob` knows jobs only by job id, and goes wrong when a worker
 * that lost its lock gets the same job again; a run id is never used twice.
 */
@Injectable()
export class ActiveRuns {
  private readonly runs = new Map<string, { run: ActiveRun; settled: Promise<unknown> }>();
  private readonly neverBegun = new Set<string>();

  get size(): number {
    return this.runs.size;
  }

  get(runId: string): ActiveRun | undefined {
    return this.runs.get(runId)?.run;
  }

  all(): ActiveRun[] {
    return [...this.runs.values()].map(({ run }) => run);
  }

  /** Keeps the run here until `work` is done. */
  async during<T>(run: ActiveRun, work: () => Promise<T>): Promise<T> {
    const outcome = work();
    this.runs.set(run.runId, { run, settled: outcome.catch(() => undefined) });
    try {
      return await outcome;
    } finally {
      this.runs.delete(run.runId);
    }
  }

  /** Remembers that this run has no process and never had one, although Postgres may have recorded the claim. */
  rememberNeverBegun({ runId }: ActiveRun): void {
    this.neverBegun.add(runId);
    const [oldest] = this.neverBegun;
    if (oldest !== undefined && this.neverBegun.size > MOST_NEVER_BEGUN) this.neverBegun.delete(oldest);
  }

  hasNeverBegun(runId: string): boolean {
    return this.neverBegun.has(runId);
  }

  stopAll(reason: StopReason): void {
    for (const run of this.all()) run.stop(reason);
  }

  /** Resolves once every process that exists at this moment is gone. */
  async gone(): Promise<void> {
    await Promise.all(this.all().map((run) => run.gone()));
  }

  /** Resolves once every run of this moment has ended and its end is recorded. */
  async settled(): Promise<void> {
    await Promise.all([...this.runs.values()].map(({ settled }) => settled));
  }
}
