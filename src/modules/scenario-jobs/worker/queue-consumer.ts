import { setMaxListeners } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable } from '@nestjs/common';
import { DelayedError, type Job, Worker } from 'bullmq';
import { SETTINGS_TOKEN, type Settings } from '../../../config/settings';
import { LOGGER, type Logger } from '../../../infrastructure/logger';
import { connectPatiently, type RedisConnection } from '../../../infrastructure/redis';
import { within } from '../../../infrastructure/within';
import { QUEUE_NAME } from '../job-queue';
import { atMostEvery } from './at-most-every';
import { type Outcome, RunJob } from './run-job';

/** How soon a job that another run has is delivered again. */
const TAKEN_DELAY_MS = 2000;
/** How long the place of a job that this worker could not run stays empty. */
const REST_MS = 2000;
const QUEUE_RETRY_MS = 1000;
const CLOSE_LIMIT_MS = 3000;
const WARN_EVERY_MS = 10_000;

/** Pauses when Redis refuses to give a job: BullMQ would ask again and again without a pause. */
class PatientWorker extends Worker {
  protected override async moveToActive(token: string, name?: string): Promise<Job> {
    try {
      return await super.moveToActive(token, name);
    } catch (error) {
      await sleep(QUEUE_RETRY_MS);
      throw error;
    }
  }
}

/**
 * Takes jobs from BullMQ and runs them. BullMQ only decides who gets a job and when: retries, attempts and results are
 * in the row, so a queue that loses its data changes none of them.
 */
@Injectable()
export class QueueConsumer {
  private worker: Worker | undefined;
  private connection: RedisConnection | undefined;
  private readonly pausing = new AbortController();
  private readonly warn = atMostEvery<Error>(WARN_EVERY_MS, (error) =>
    this.logger.warn({ err: error }, 'queue error, will try again'),
  );

  constructor(
    private readonly runJob: RunJob,
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {
    // Each place that stays empty listens.
    setMaxListeners(0, this.pausing.signal);
  }

  /** Tries until it takes jobs or is told to end. BullMQ never recovers if Redis refuses its first question. */
  async start(): Promise<void> {
    while (!this.paused) {
      const worker = this.open();
      try {
        await worker.waitUntilReady();
        return void worker.run().catch((error: Error) => this.warn.take(error));
      } catch (error) {
        this.warn.take(error as Error);
        await this.stop({ force: true });
        await sleep(QUEUE_RETRY_MS);
      }
    }
  }

  private open(): Worker {
    const { settings } = this;
    const connection = connectPatiently(settings, this.logger, 'queue');
    this.connection = connection;
    this.worker = new PatientWorker(QUEUE_NAME, (job, token) => this.process(job, token as string), {
      autorun: false,
      connection,
      prefix: settings.QUEUE_PREFIX,
      concurrency: settings.WORKER_CONCURRENCY,
      lockDuration: settings.LOCK_MS,
      stalledInterval: settings.LOCK_MS,
      // The row decides how often a job may begin: BullMQ would fail the job without asking it.
      maxStalledCount: Number.MAX_SAFE_INTEGER,
      runRetryDelay: QUEUE_RETRY_MS,
    });
    // Lost locks, lost connections, refusals: the row is what counts, and BullMQ carries on by itself.
    this.worker.on('error', (error) => this.warn.take(error));
    this.worker.on('stalled', (jobId) =>
      this.logger.warn({ jobId }, 'the lock of a job has expired, so the job is delivered again'),
    );
    return this.worker;
  }

  private get paused(): boolean {
    return this.pausing.signal.aborted;
  }

  /** Takes no further jobs; running ones go on. */
  async pause(): Promise<void> {
    this.pausing.abort();
    await this.worker?.pause(true);
  }

  /** Ends the connections. BullMQ would wait without limit for a Redis that is away, and nothing depends on it. */
  async stop({ force = false } = {}): Promise<void> {
    const { worker, connection } = this;
    if (!worker) return;
    await within(CLOSE_LIMIT_MS, 'closing the queue', worker.close(force)).catch((error: unknown) =>
      this.logger.warn({ err: error }, 'left the queue without waiting for Redis any longer'),
    );
    // BullMQ ends its own connections, but leaves ours alone.
    connection?.disconnect();
  }

  private async process(job: Job, token: string): Promise<void> {
    // BullMQ's pause does not stop a fetch that is under way: a job that it brings is not begun here any more.
    if (this.paused) return this.deliverAgain(job, token, 0);
    const jobId = job.id as string;
    let outcome: Outcome;
    try {
      outcome = await this.runJob.run(jobId);
    } catch (error) {
      this.logger.error({ err: error, jobId }, 'run could not be carried through, will try again');
      return this.leaveToOthers(job, token);
    }
    switch (outcome.kind) {
      case 'refused':
      case 'completed':
      case 'failed':
      case 'cancelled':
        return; // BullMQ drops the entry.
      case 'superseded': // Or the run requeued the job, and the answer that said so was lost.
      case 'taken': // BullMQ took the other run's worker for dead; the worker's own row says whether it is.
        return this.deliverAgain(job, token, TAKEN_DELAY_MS);
      case 'retry':
        return this.deliverAgain(job, token, outcome.delayMs);
      case 'interrupted':
        return this.deliverAgain(job, token, 0);
      case 'not_started':
        return this.leaveToOthers(job, token);
      default:
        outcome satisfies never;
    }
  }

  /**
   * Has the job delivered again at once, and leaves its place here empty for a while. A worker that can begin nothing
   * would otherwise always be free; and the clock that is ahead gets whatever is due first.
   */
  private async leaveToOthers(job: Job, token: string): Promise<never> {
    await job.moveToDelayed(Date.now(), token);
    await sleep(REST_MS, undefined, { signal: this.pausing.signal }).catch(() => undefined);
    throw new DelayedError();
  }

  private async deliverAgain(job: Job, token: string, delayMs: number): Promise<never> {
    await job.moveToDelayed(Date.now() + delayMs, token);
    throw new DelayedError();
  }
}
