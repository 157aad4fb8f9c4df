import { Inject, Injectable, type OnApplicationShutdown } from '@nestjs/common';
import { Queue } from 'bullmq';
import { SETTINGS_TOKEN, type Settings } from '../../config/settings';
import { LOGGER, type Logger } from '../../infrastructure/logger';
import { connectImpatiently, type RedisConnection } from '../../infrastructure/redis';
import { within } from '../../infrastructure/within';
import { cancelChannel, type CancelMessage, ring } from './doorbell';

export const QUEUE_NAME = 'scenario-jobs';

/** Longest wait for Redis: all that a caller gains from the queue is speed; the truth is in Postgres. */
const REDIS_LIMIT_MS = 1000;

/**
 * Every job has a priority because BullMQ then keeps it in a sorted set, from which one job is removed in O(log n).
 * Removing one from the plain list takes O(n) and blocks Redis: 3.5 ms with 500 000 jobs in it.
 */
const PRIORITY = 1;

/** Twice the longest wait before a retry. Only a worker whose clock was ahead can delay a job of ours for longer. */
const LONGEST_DELAY_MS = 120_000;
/** BullMQ's score of a delayed job: when it is due, in milliseconds since 1970, times this. */
const DUE_SCALE = 0x1000;

/**
 * The BullMQ queue, which delivers jobs to workers. An entry holds the job's id and nothing else; the rest of the job
 * stays in Postgres. Every method may throw if Redis cannot be reached, within a limited time.
 */
@Injectable()
export class JobQueue implements OnApplicationShutdown {
  private readonly redis: RedisConnection;
  private readonly queue: Queue;

  constructor(
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
    @Inject(LOGGER) logger: Logger,
  ) {
    this.redis = connectImpatiently(settings, logger, REDIS_LIMIT_MS);
    this.queue = new Queue(QUEUE_NAME, {
      connection: this.redis,
      prefix: settings.QUEUE_PREFIX,
      // BullMQ checks the version once, at the start; if it gets no answer then, it never adds a job again.
      skipVersionCheck: true,
      // The entry of a finished job holds nothing that the row does not.
      defaultJobOptions: { removeOnComplete: true, removeOnFail: true, priority: PRIORITY },
    });
    this.queue.on('error', (error) => logger.debug({ err: error }, 'queue error'));
  }

  async onApplicationShutdown() {
    await this.queue.close().catch(() => undefined);
    this.redis.disconnect();
  }

  /** Adds the job. Adding one that is already there changes nothing. */
  async add(jobId: string): Promise<void> {
    await this.limited('queue.add', () => this.queue.add('run', {}, { jobId }));
  }

  /** Takes the job out, unless a worker has just taken it. */
  async remove(jobId: string): Promise<void> {
    await this.limited('queue.remove', () => this.queue.remove(jobId));
  }

  /** Rings the doorbell of a worker. Returns how many heard it. */
  async ring(workerId: string, message: CancelMessage): Promise<number> {
    const channel = cancelChannel(this.settings, workerId);
    return this.limited('doorbell', () => ring(this.redis, channel, message));
  }

  /**
   * Adds a job that is missing. Removes any leftover of it first: BullMQ would take that for the job and add nothing.
   */
  async addAgain(jobId: string): Promise<void> {
    await this.remove(jobId);
    await this.add(jobId);
  }

  /**
   * Those of the jobs that the queue will not deliver, or not soon, because none of its lists has them. An entry that
   * is in no list is never delivered.
   */
  async missing(jobIds: string[]): Promise<string[]> {
    if (jobIds.length === 0) return [];
    // In one transaction, because jobs move from list to list.
    const questions = this.redis.multi();
    for (const list of ['active', 'wait', 'paused']) questions.lrange(this.queue.toKey(list), 0, -1);
    for (const set of ['prioritized', 'delayed']) questions.zmscore(this.queue.toKey(set), ...jobIds);
    const answers = (await this.limited('looking for jobs', () => questions.exec())) ?? [];
    const [active, wait, paused, prioritized, delayed] = answers.map(([error, answer]) => {
      if (error) throw error;
      return answer as (string | null)[];
    }) as [string[], string[], string[], (string | null)[], (string | null)[]];
    const inLists = new Set([...active, ...wait, ...paused]);
    const latest = (Date.now() + LONGEST_DELAY_MS) * DUE_SCALE;
    return jobIds.filter((id, index) => {
      const isDue = delayed[index] !== null && Number(delayed[index]) < latest;
      return !inLists.has(id) && prioritized[index] === null && !isDue;
    });
  }

  /** Resolves when Redis answers, else throws. */
  async ping(): Promise<void> {
    await this.limited('ping', () => this.redis.ping());
  }

  /**
   * Fails fast: BullMQ would wait without limit for a Redis that was never there, and a cluster would look for its
   * nodes.
   */
  private async limited<T>(what: string, work: () => Promise<T>): Promise<T> {
    if (this.redis.status !== 'ready') throw new Error(`${what}: Redis is not connected`);
    return within(REDIS_LIMIT_MS, what, work());
  }
}
