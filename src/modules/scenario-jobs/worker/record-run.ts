import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable } from '@nestjs/common';
import { SETTINGS_TOKEN, type Settings } from '../../../config/settings';
import { isDatabaseUnavailable } from '../../../infrastructure/database-errors';
import { type Logger } from '../../../infrastructure/logger';
import { Metrics } from '../../../infrastructure/metrics';
import { type StopKind } from '../job-status';
import { type ClaimedJob, type Run, RunRepository } from '../run.repository';
import { type ActiveRun } from './active-runs';
import { type StopReason } from './task-messages';
import { type TaskEnd } from './task-process';
import { parseResult } from './task-result';

/** What became of a run that had the job. */
export type Recorded =
  | { kind: 'completed' }
  | { kind: 'failed'; code: string }
  /** The job was cancelled, and the process is gone. */
  | { kind: 'cancelled'; how: StopKind }
  /** Another run has taken over. */
  | { kind: 'superseded' }
  /** An error that may pass: the job is queued again, to run after the delay. */
  | { kind: 'retry'; delayMs: number }
  /** Cut short through no fault of the job, which is queued again. */
  | { kind: 'interrupted' }
  /** The task could not be started or loaded: the job is queued again. */
  | { kind: 'not_started' };

/** Why a run did not end by itself. `frozen`: this worker was frozen, and its watchdog has ended the task. */
type Reason = StopReason | 'frozen';

/** How a run ended: its task; why it was stopped, if it was; and how its process ended. */
export type RunEnd = {
  /** `given up`: nothing began, because the job has had all its attempts. */
  end: TaskEnd | { kind: 'given up' };
  reason: Reason | undefined;
  how: StopKind;
};

type RunError = { code: string; message: string };

/**
 * Signals that ask a process to end and that we did not send: somebody is ending everything, perhaps the worker too.
 */
const FROM_OUTSIDE = new Set<NodeJS.Signals | null>(['SIGTERM', 'SIGINT', 'SIGHUP']);

const MAX_BACKOFF_MS = 60_000;
const RECORD_AGAIN_AFTER_MS = 250;

/**
 * Records how a run ended, if the row still allows it. If not, the job was cancelled, which is then confirmed, or another
 * run has taken over.
 */
@Injectable()
export class RecordRun {
  constructor(
    private readonly repository: RunRepository,
    private readonly metrics: Metrics,
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
  ) {
    // An alert on the first of these needs the counter to have been zero before.
    for (const status of ['completed', 'failed']) this.metrics.finished.inc({ status }, 0);
  }

  /**
   * Records the end, and returns what became of the run. Waits for a Postgres that is away, because the work is done; but
   * not forever: then it throws, and the run counts as lost.
   */
  async record(run: ActiveRun, job: ClaimedJob, ended: RunEnd, logger: Logger): Promise<Recorded> {
    const { reason, how } = ended;
    const settle = () => (reason ? this.settleStopped(run, reason) : this.settle(run, job, ended.end));
    const outcome = (await this.whenPostgresAnswers(settle)) ?? (await this.explain(run, how));
    if (outcome.kind === 'completed' || outcome.kind === 'failed') this.metrics.finished.inc({ status: outcome.kind });
    const refused = outcome.kind === 'cancelled' || outcome.kind === 'superseded';
    if (refused && !reason) this.metrics.lateResults.inc();
    const { kind, ...details } = outcome;
    const isFault = kind === 'failed' || kind === 'not_started';
    logger[isFault ? 'warn' : 'info']({ from: 'processing', outcome: kind, ...details }, 'run ended');
    return outcome;
  }

  /**
   * Records that the run was stopped. Returns undefined if it may record nothing: the job was cancelled or taken over.
   */
  private async settleStopped(run: ActiveRun, reason: Reason): Promise<Recorded | undefined> {
    switch (reason) {
      case 'cancelled':
      case 'superseded':
        return undefined;
      case 'interrupted':
        return this.interrupt(run, { countsAsAttempt: false });
      case 'frozen': // The attempt counts: the task may be the reason.
        return this.interrupt(run, { countsAsAttempt: true });
      case 'timeout':
        return this.fail(run, {
          code: 'TASK_TIMEOUT',
          message: `The task took longer than ${this.settings.TASK_TIMEOUT_MS / 1000} seconds`,
        });
    }
  }

  /** Records how the run ended by itself. Returns undefined if it may record nothing, as above. */
  private async settle(run: ActiveRun, job: ClaimedJob, end: RunEnd['end']): Promise<Recorded | undefined> {
    switch (end.kind) {
      case 'given up':
        return this.fail(run, {
          code: 'WORKER_LOST',
          message: 'The job was given up: none of its attempts had a result',
        });
      case 'returned': {
        const { scenario, error } = parseResult(end.result);
        if (error) return this.fail(run, error);
        return (await this.repository.complete(run, scenario)) ? { kind: 'completed' } : undefined;
      }
      case 'threw':
        return end.error.retryable ? this.retry(run, job, end.error) : this.fail(run, end.error);
      case 'not started':
      case 'not loaded': // No attempt: nothing of the job has been tried yet.
        return (await this.repository.requeue(run, { countsAsAttempt: false })) ? { kind: 'not_started' } : undefined;
      case 'exited': {
        const error = describeExit(end, this.settings.TASK_MEMORY_MB);
        return FROM_OUTSIDE.has(end.signal) ? this.retry(run, job, error) : this.fail(run, error);
      }
    }
  }

  /** Has the job run again later, unless this was its last attempt. */
  private async retry(run: Run, { attempt }: ClaimedJob, error: RunError): Promise<Recorded | undefined> {
    if (attempt >= this.settings.MAX_ATTEMPTS) return this.fail(run, error);
    if (!(await this.repository.requeue(run, { countsAsAttempt: true }))) return undefined;
    return { kind: 'retry', delayMs: this.backoff(attempt) };
  }

  private async fail(run: Run, error: RunError): Promise<Recorded | undefined> {
    return (await this.repository.fail(run, error)) ? { kind: 'failed', code: error.code } : undefined;
  }

  private async interrupt(run: Run, attempt: { countsAsAttempt: boolean }): Promise<Recorded | undefined> {
    return (await this.repository.requeue(run, attempt)) ? { kind: 'interrupted' } : undefined;
  }

  /** Says why the row refused what the run would record; confirms the stop if the job was cancelled. */
  private async explain(run: ActiveRun, how: StopKind): Promise<Recorded> {
    // While a process of the run lives on that cannot be killed, the run keeps its place, and no stop is confirmed.
    await run.gone();
    return this.whenPostgresAnswers(() => this.confirmOrExplain(run, how));
  }

  private async confirmOrExplain(run: ActiveRun, how: StopKind): Promise<Recorded> {
    const seconds = await this.repository.confirmStopped(run, how);
    if (seconds !== undefined) {
      this.metrics.stopSeconds.observe({ how }, seconds);
      return { kind: 'cancelled', how };
    }
    // Or this run recorded its end before, and the answer was lost.
    const recorded = await this.repository.findEnd(run);
    if (recorded?.status === 'completed') return { kind: 'completed' };
    if (recorded?.status === 'failed') return { kind: 'failed', code: recorded.errorCode ?? '' };
    return recorded ? { kind: 'cancelled', how } : { kind: 'superseded' };
  }

  private async whenPostgresAnswers<T>(work: () => Promise<T>): Promise<T> {
    const deadline = performance.now() + this.settings.BLIND_MS;
    for (;;) {
      try {
        return await work();
      } catch (error) {
        if (!isDatabaseUnavailable(error) || performance.now() > deadline) throw error;
        await sleep(RECORD_AGAIN_AFTER_MS);
      }
    }
  }

  private backoff(attempt: number): number {
    return Math.min(this.settings.RETRY_BACKOFF_MS * 2 ** (attempt - 1), MAX_BACKOFF_MS);
  }
}

function describeExit(end: Extract<TaskEnd, { kind: 'exited' }>, memoryMb: number) {
  if (end.outOfMemory)
    return { code: 'TASK_OUT_OF_MEMORY', message: `The task used more than ${memoryMb} MB of memory` };
  if (end.signal) return { code: 'TASK_CRASHED', message: `The task was ended by ${end.signal}` };
  if (end.code === 0) return { code: 'TASK_NO_RESULT', message: 'The task ended without a result' };
  return { code: 'TASK_CRASHED', message: `The task ended with exit code ${end.code}` };
}
