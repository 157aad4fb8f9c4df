import { setImmediate as nextTurn } from 'node:timers/promises';
import { Inject, Injectable } from '@nestjs/common';
import { type Caller, type PresentedKey } from '../../../auth/caller';
import { LOGGER, type Logger } from '../../../infrastructure/logger';
import { Metrics } from '../../../infrastructure/metrics';
import { JobQueue } from '../job-queue';
import { type CancelledJob, JobRepository, type JobRow } from '../job.repository';
import { JobNotCancellable, JobNotFound, RowLocked } from '../job.errors';
import { isCancellable } from '../job-status';
import { untilUnlocked } from './until-unlocked';

/** What a cancel found and did, and for whom. */
export type Cancelled = {
  job: JobRow;
  caller: Caller;
  outcome: 'cancelled' | 'replayed';
  from: 'queued' | 'processing' | 'cancelled';
};

/**
 * Cancels a job. The row decides, in one conditional statement that also looks up the API key; once it is committed,
 * nothing can complete the job any more. Only then is the queue told, or the worker that runs the job: both only make
 * the effect fast, and either may fail without harm.
 *
 * - queued, delayed or waiting for a retry: cancelled, and taken out of the queue. It never starts.
 * - processing: cancelled, and its worker is told to stop the task. Whatever the task computes is discarded.
 * - completed, failed, cancelled: `JobNotCancellable`, unless a request with the same idempotency key cancelled it:
 *   then the answer of that request again.
 * - missing, malformed id, another workspace's: `JobNotFound`.
 * - API key that does not work: the 401 or 403 error that `identify` throws.
 * - finishing at this very moment: whichever statement Postgres takes first decides, for everyone.
 */
@Injectable()
export class CancelJob {
  constructor(
    private readonly jobs: JobRepository,
    private readonly queue: JobQueue,
    private readonly metrics: Metrics,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {
    // An alert on the first failure needs the counter to have been zero before.
    for (const outcome of ['heard', 'unheard', 'failed']) metrics.doorbells.inc({ outcome }, 0);
    metrics.finished.inc({ status: 'cancelled' }, 0);
  }

  async cancel(key: PresentedKey, jobId: string, idempotencyKey: string | null): Promise<Cancelled> {
    const answer = await untilUnlocked(async () => {
      const cancelled = await this.jobs.cancel({ keyHash: key.hash, jobId, idempotencyKey });
      if (!cancelled) return this.explain(key, jobId, idempotencyKey);
      key.recordCaller(cancelled.caller);
      return this.deliver(cancelled);
    });
    if (answer) return answer;
    this.metrics.cancelRequests.inc({ from: 'none', outcome: 'locked' });
    throw new RowLocked(`job ${jobId}`);
  }

  /**
   * Says why nothing was cancelled, or repeats the answer that the cancelling request got. Returns undefined if the job
   * is open all the same: its row was locked, by a claim or a result that is under way.
   */
  private async explain(
    key: PresentedKey,
    jobId: string,
    idempotencyKey: string | null,
  ): Promise<Cancelled | undefined> {
    const found = await this.jobs.find({ keyHash: key.hash, jobId });
    if (!found) {
      await key.identify();
      this.metrics.cancelRequests.inc({ from: 'none', outcome: 'not_found' });
      throw new JobNotFound(jobId);
    }
    const { job, caller, cancelIdempotencyKey } = found;
    key.recordCaller(caller);
    if (isCancellable(job.status)) return undefined;
    if (idempotencyKey !== null && cancelIdempotencyKey === idempotencyKey) {
      this.metrics.cancelRequests.inc({ from: 'cancelled', outcome: 'replayed' });
      return { job, caller, outcome: 'replayed', from: 'cancelled' };
    }
    this.metrics.cancelRequests.inc({ from: job.status, outcome: 'not_cancellable' });
    throw new JobNotCancellable(jobId, job.status);
  }

  private deliver({ job, caller, run }: CancelledJob): Cancelled {
    const from = run ? 'processing' : 'queued';
    // The answer does not wait for Redis; nothing depends on it.
    void this.tellOthers(job, run);
    this.metrics.cancelRequests.inc({ from, outcome: 'cancelled' });
    this.metrics.finished.inc({ status: 'cancelled' });
    return { job, caller, outcome: 'cancelled', from };
  }

  /** Makes the cancel take effect at once. If that fails, the claim, the poll or the reconciler does it later. */
  private async tellOthers({ id: jobId, completedAt }: CancelledJob['job'], run: CancelledJob['run']): Promise<void> {
    try {
      if (!run) {
        // The answer goes out first: a claim of this entry would fail anyway. Only a running task must be told at once.
        await nextTurn();
        await this.queue.remove(jobId);
        return;
      }
      const { id: runId, workerId, stopToken } = run;
      const message = { runId, stopToken, cancelledAt: Number(completedAt) };
      const heard = await this.queue.ring(workerId, message);
      this.metrics.doorbells.inc({ outcome: heard > 0 ? 'heard' : 'unheard' });
    } catch (error) {
      if (run) this.metrics.doorbells.inc({ outcome: 'failed' });
      this.logger.warn(
        { err: error, jobId, runId: run?.id },
        'cancel could not be delivered, and will be noticed later',
      );
    }
  }
}
