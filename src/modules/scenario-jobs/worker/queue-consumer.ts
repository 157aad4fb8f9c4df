import { Inject, Injectable } from '@nestjs/common';
import { DelayedError, type Job, Worker } from 'bullmq';
import { SETTINGS_TOKEN, type Settings } from '../../../config/settings';
import { LOGGER, type Logger } from '../../../infrastructure/logger';
import { connectPatiently } from '../../../infrastructure/redis';
import { within } from '../../../infrastructure/within';
import { QUEUE_NAME } from '../job-queue';
import { type Outcome, RunJob } from './run-job';

/** The wait before a job is tried again that could not be begun: another run has it, or Postgres could not be asked. */
const NOT_BEGUN_DELAY_MS = 2000;
const CONNECTION_RETRY_MS = 1000;
const CLOSE_LIMIT_MS = 3000;

/**
 * Takes jobs from BullMQ and runs them. BullMQ decides who gets a job and when, nothing more: retries, attempts
 * and results are the row's, so that a queue that forgets changes none of them.
 */
@Injectable()
export class QueueConsumer {
  private worker: Worker | undefined;
  private paused = false;

  constructor(
    private readonly runJob: RunJob,
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {}

  start(): void {
    const { settings } = this;
    this.worker = new Worker(QUEUE_NAME, (job, token) => this.process(job, token as string), {
      connection: connectPatiently(settings, this.logger, 'queue'),
      prefix: settings.QUEUE_PREFIX,
      concurrency: settings.WORKER_CONCURRENCY,
      lockDuration: settings.LOCK_MS,
      stalledInterval: settings.LOCK_MS,
      // How often a job may be begun is for the row to say: BullMQ would fail the job without asking it.
      maxStalledCount: Number.MAX_SAFE_INTEGER,
      runRetryDelay: CONNECTION_RETRY_MS,
    });
    // Lost locks and lost connections: the row is what counts, and BullMQ goes on by itself.
    this.worker.on('error', (error) => this.logger.debug({ err: error }, 'queue error'));
    this.worker.on('stalled', (jobId) => this.logger.warn({ jobId }, 'a worker was lost, its job is delivered again'));
  }

  /** Takes no further jobs. Those that run go on. */
  async pause(): Promise<void> {
    this.paused = true;
    await this.worker?.pause(true);
  }

  /** Ends the connections. BullMQ would wait without a limit for a Redis that is away, and nothing depends on it. */
  async stop(): Promise<void> {
    if (!this.worker) return;
    await within(CLOSE_LIMIT_MS, 'closing the queue', this.worker.close()).catch((error: unknown) =>
      this.logger.warn({ err: error }, 'left the queue without its answer'),
    );
  }

  private async process(job: Job, token: string): Promise<void> {
    // BullMQ's pause leaves a fetch that is under way alone: what it brings is not begun here any more.
    if (this.paused) return this.deliverAgain(job, token, 0);
    const jobId = job.id as string;
    let outcome: Outcome;
    try {
      outcome = await this.runJob.run(jobId);
    } catch (error) {
      this.logger.error({ err: error, jobId }, 'run could not be carried through, will try again');
      outcome = { kind: 'retry', delayMs: NOT_BEGUN_DELAY_MS };
    }
    switch (outcome.kind) {
      case 'refused':
      case 'completed':
      case 'failed':
      case 'cancelled':
      case 'superseded':
        return; // BullMQ drops the entry.
      case 'taken': // BullMQ took its worker for dead. Whether it is, its row says.
        return this.deliverAgain(job, token, NOT_BEGUN_DELAY_MS);
      case 'retry':
        return this.deliverAgain(job, token, outcome.delayMs);
      case 'interrupted':
        return this.deliverAgain(job, token, 0);
      default:
        outcome satisfies never;
    }
  }

  private async deliverAgain(job: Job, token: string, delayMs: number): Promise<never> {
    await job.moveToDelayed(Date.now() + delayMs, token);
    throw new DelayedError();
  }
}
