import { Inject, Injectable } from '@nestjs/common';
import { SETTINGS_TOKEN, type Settings } from '../../../config/settings';
import { LOGGER, type Logger } from '../../../infrastructure/logger';
import { Metrics } from '../../../infrastructure/metrics';
import { JobQueue } from '../job-queue';
import { RepairRepository } from '../repair.repository';

const PAGE = 1000;
/** How many jobs are added to the queue at the same time: a hundred thousand must not take many minutes. */
const ADDED_AT_ONCE = 50;
/** A create takes no longer than this between its two writes. */
const SETTLED_MS = 2000;
/** Longest pass. This worker's next pass continues where it ended. */
const PASS_LIMIT_MS = 60_000;
/** A pass holds its lock for longer than it works, so that the lock covers the queries still under way at its end. */
const LOCK_LIMIT_MS = PASS_LIMIT_MS + 30_000;

const REPAIRS = ['added', 'requeued', 'worker_lost', 'orphan_requeued', 'orphan_confirmed'];

/**
 * Compares rows with the queue and repairs what differs: a queued job that the queue does not know is added; a
 * processing job whose worker is dead and that the queue does not know is requeued; a cancelled run whose worker is
 * dead is confirmed as `worker_lost`. Runs on one worker at a time. Thanks to it, a create that died between its two
 * writes, or a Redis that lost everything, costs time but no job.
 */
@Injectable()
export class Reconciler {
  private timer: NodeJS.Timeout | undefined;
  private stopped = false;
  private pass: Promise<void> | undefined;
  /** The id of the job after which the next pass continues; empty to begin with the first. */
  private after = '';

  constructor(
    private readonly repository: RepairRepository,
    private readonly queue: JobQueue,
    private readonly metrics: Metrics,
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {
    // An alert on the first repair needs the counter to have been zero before.
    for (const repair of REPAIRS) this.metrics.repairs.inc({ repair }, 0);
  }

  start(): void {
    this.timer = setTimeout(() => {
      this.pass = this.reconcile().finally(() => {
        if (!this.stopped) this.start();
      });
    }, this.settings.RECONCILE_MS);
  }

  async stop(): Promise<void> {
    this.stopped = true;
    clearTimeout(this.timer);
    await this.pass;
  }

  private async reconcile(): Promise<void> {
    try {
      await this.repository.exclusively(async () => {
        await this.repair(performance.now() + PASS_LIMIT_MS);
        await this.repository.forgetOldWorkers();
      }, LOCK_LIMIT_MS);
    } catch (error) {
      this.logger.warn({ err: error }, 'reconciler pass failed, will try again');
    }
  }

  private async repair(until: number): Promise<void> {
    while (!this.stopped && performance.now() < until) {
      // For each page, because there may be many, and a stop that is not confirmed is worth an alert.
      await this.confirmLost();
      const page = await this.repository.findDependingOnQueue(
        this.after,
        PAGE,
        SETTLED_MS,
        this.settings.WORKER_LOST_MS,
      );
      const missing = new Set(await this.queue.missing(page.map(({ jobId }) => jobId)));
      const unknown = page.filter(({ jobId }) => missing.has(jobId));
      const lost = unknown.flatMap(({ jobId, runId }) => (runId ? [{ jobId, runId }] : []));
      if (lost.length > 0) await this.repository.requeueLost(lost, this.settings.WORKER_LOST_MS);
      // A job that was cancelled since the page was read has been taken out of the queue, and is not missing.
      const queued = await this.repository.queuedAmong([...missing]);
      const due = unknown.filter(({ jobId }) => queued.has(jobId));
      await this.takeBack(await this.add(due, until), until);
      // Part of this page may be left, so it is read once more.
      if (performance.now() > until) return;
      const last = page.length === PAGE ? page.at(-1) : undefined;
      this.after = last?.jobId ?? '';
      if (!last) return;
    }
  }

  private async confirmLost(): Promise<void> {
    for (const { jobId, runId } of await this.repository.confirmLost(this.settings.WORKER_LOST_MS)) {
      this.repaired('worker_lost', jobId, runId);
    }
  }

  /** Adds the jobs, and returns the ids of those for which there was time. */
  private async add(jobs: { jobId: string; runId: string | null }[], until: number): Promise<string[]> {
    const added: string[] = [];
    while (added.length < jobs.length && !this.stopped && performance.now() < until) {
      const some = jobs.slice(added.length, added.length + ADDED_AT_ONCE);
      const results = await Promise.allSettled(some.map(({ jobId }) => this.queue.addAgain(jobId)));
      for (const [index, { jobId, runId }] of some.entries()) {
        if (results[index]?.status === 'rejected') continue;
        added.push(jobId);
        this.repaired(runId ? 'requeued' : 'added', jobId, runId);
      }
      const failure = results.find((result) => result.status === 'rejected');
      if (failure) throw failure.reason;
    }
    return added;
  }

  /**
   * Takes jobs out again that were cancelled while they were being added, whose cancel found them not yet in the queue.
   * A running job is locked there, and stays.
   */
  private async takeBack(added: string[], until: number): Promise<void> {
    const queued = await this.repository.queuedAmong(added);
    for (const jobId of added) {
      // A job that is left in the queue is refused when its turn comes.
      if (performance.now() > until) return;
      if (!queued.has(jobId)) await this.queue.remove(jobId);
    }
  }

  private repaired(repair: string, jobId: string, runId: string | null): void {
    this.metrics.repairs.inc({ repair });
    this.logger.warn({ jobId, runId, repair }, 'reconciler repaired a job');
  }
}
