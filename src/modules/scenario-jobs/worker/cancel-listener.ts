import { Inject, Injectable } from '@nestjs/common';
import { SETTINGS_TOKEN, type Settings } from '../../../config/settings';
import { LOGGER, type Logger } from '../../../infrastructure/logger';
import { Metrics } from '../../../infrastructure/metrics';
import { connectPatiently, type RedisConnection } from '../../../infrastructure/redis';
import { cancelChannel, listenAt, parseMessage } from '../doorbell';
import { RunRepository } from '../run.repository';
import { type OwedRun, WorkerRepository } from '../worker.repository';
import { type ActiveRun, ActiveRuns } from './active-runs';
import { WORKER_ID } from './worker-id';

/** A subscription without an answer for this long is dead, and is made anew. */
const DEAF_MS = 5000;

/** What makes the worker ask Postgres about its runs. */
const SOURCES = ['doorbell', 'poll', 'resubscribe'] as const;
type Source = (typeof SOURCES)[number];

/**
 * Learns which of this worker's runs must stop, in three ways, each of which is enough: the doorbell, a poll, and a
 * question whenever the subscription to the doorbell is made anew. All three ask Postgres, unless a message has the
 * run's own token, which only a committed cancel reads: that run is stopped even while Postgres cannot be asked.
 */
@Injectable()
export class CancelListener {
  private subscription: RedisConnection | undefined;
  private timer: NodeJS.Timeout | undefined;
  private stopped = false;
  /** Whether the newest connection is not subscribed because Redis refused. */
  private deaf = false;
  private lastSeen = performance.now();
  private asking: Promise<void> | undefined;
  private repairing: Promise<void> | undefined;
  private askAgain: Source | undefined;
  private sayAlive!: () => void;
  /** Resolves once Postgres has recorded that this worker lives. */
  readonly alive = new Promise<void>((resolve) => (this.sayAlive = resolve));

  constructor(
    private readonly workers: WorkerRepository,
    private readonly repository: RunRepository,
    private readonly runs: ActiveRuns,
    private readonly metrics: Metrics,
    @Inject(WORKER_ID) private readonly workerId: string,
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {}

  start(): void {
    // An alert on the first observation needs the metric to have been zero before.
    for (const source of SOURCES) this.metrics.signalSeconds.zero({ source });
    const subscription = connectPatiently(this.settings, this.logger, 'doorbell', {
      silenceMs: DEAF_MS,
      sharded: true,
    });
    this.subscription = subscription;
    // Subscribes again with each new connection.
    subscription.on('ready', () => void this.listen(subscription));
    // On a cluster the subscription has a connection of its own, which moves with the slot.
    subscription.on('subscribersReady', () => this.ask('resubscribe'));
    for (const event of ['message', 'smessage'] as const) {
      subscription.on(event, (_channel: string, message: string) => this.hear(message));
    }
    this.poll();
  }

  async stop(): Promise<void> {
    this.stopped = true;
    clearTimeout(this.timer);
    this.subscription?.disconnect();
    await this.asking;
    await this.repairing;
  }

  private async listen(subscription: RedisConnection): Promise<void> {
    try {
      await listenAt(subscription, cancelChannel(this.settings, this.workerId));
    } catch (error) {
      if (!this.deaf) this.logger.warn({ err: error }, 'doorbell could not be subscribed to, will try again');
      this.deaf = true;
      return;
    }
    this.deaf = false;
    this.ask('resubscribe');
  }

  private hear(message: string): void {
    const told = parseMessage(message);
    const run = told && this.runs.get(told.runId);
    if (told && run && run.stopToken === told.stopToken) {
      this.stopRun(run, 'doorbell', (Date.now() - told.cancelledAt) / 1000);
    } else this.ask('doorbell');
  }

  private poll(): void {
    if (this.subscription?.status === 'ready') {
      if (this.deaf) void this.listen(this.subscription);
      // A subscription can be silent for hours: only an answer shows that the connection is still there.
      else this.subscription.ping().catch(() => undefined);
    }
    // Set before asking: doorbells that never end must not delay the next sign of life.
    this.timer = setTimeout(() => this.poll(), this.settings.CANCEL_POLL_MS);
    this.ask('poll');
  }

  /** Asks Postgres, one question at a time. Whatever comes in meanwhile is answered by one more question afterwards. */
  private ask(source: Source): void {
    // The subscription may be made while the worker ends: a further sign of life would outlive the worker.
    if (this.stopped) return;
    if (this.asking) {
      // However many doorbells ring, the poll with its sign of life gets its turn.
      if (this.askAgain === undefined || this.askAgain === 'doorbell') this.askAgain = source;
      return;
    }
    this.asking = this.askPostgres(source).finally(() => {
      const again = this.askAgain;
      this.asking = undefined;
      this.askAgain = undefined;
      if (again) this.ask(again);
    });
  }

  private async askPostgres(source: Source): Promise<void> {
    // Postgres knows only these for certain: others may be claimed while it answers.
    const claimed = this.runs.all().filter((run) => run.claimed);
    const askedAt = performance.now();
    try {
      // The doorbell is in a hurry, and a sign of life costs a commit: that is left to the poll.
      const owed = await (source === 'doorbell'
        ? this.workers.findOwed(this.workerId)
        : this.workers.reportAlive(this.workerId));
      // Only signs of life count: without them other workers take this one for dead, whatever it can still read. The
      // answer is as old as its question.
      if (source !== 'doorbell') {
        this.lastSeen = askedAt;
        this.sayAlive();
      }
      for (const { status, runId, cancelledSeconds } of owed) {
        const run = this.runs.get(runId);
        if (run && status === 'cancelled') this.stopRun(run, source, cancelledSeconds ?? 0);
      }
      const known = new Set(owed.map(({ runId }) => runId));
      for (const run of claimed) {
        if (!known.has(run.runId)) run.stop('superseded');
      }
      // Nobody waits for these orphans: one whose row is locked must not hold up the next cancel.
      const orphans = owed.filter(({ runId }) => !this.runs.get(runId));
      this.repairing ??= this.repair(orphans).finally(() => (this.repairing = undefined));
    } catch (error) {
      const blindMs = Math.round(performance.now() - this.lastSeen);
      this.logger.warn({ err: error, source, blindMs }, 'could not ask which runs were cancelled');
      // These runs cannot be told that they are cancelled, so they must not go on forever.
      if (blindMs > this.settings.BLIND_MS) this.runs.stopAll('interrupted');
    }
  }

  private stopRun(run: ActiveRun, source: Source, cancelledSeconds: number): void {
    if (!run.stop('cancelled')) return;
    const { jobId, runId } = run;
    this.metrics.signalSeconds.observe({ source }, Math.max(0, cancelledSeconds));
    this.logger.info({ jobId, runId, source }, 'stopping: the job was cancelled');
  }

  /** Repairs runs that nobody runs, because their end or their beginning could not be recorded. */
  private async repair(orphans: OwedRun[]): Promise<void> {
    for (const { jobId, runId, status } of orphans) {
      try {
        // If the run has just ended after all, neither of these changes anything.
        const neverBegun = this.runs.hasNeverBegun(runId);
        if (status === 'cancelled') {
          const how = neverBegun ? 'graceful' : 'worker_lost';
          const seconds = await this.repository.confirmStopped({ jobId, runId }, how);
          if (seconds === undefined) continue;
          this.metrics.repairs.inc({ repair: 'orphan_confirmed' });
          this.logger.warn({ jobId, runId, how }, 'confirmed the stop of a run that this worker does not run');
        } else if (await this.repository.requeue({ jobId, runId }, { countsAsAttempt: !neverBegun })) {
          this.metrics.repairs.inc({ repair: 'orphan_requeued' });
          this.logger.warn({ jobId, runId }, 'requeued a run that this worker does not run');
        }
      } catch (error) {
        this.logger.warn({ err: error, jobId, runId }, 'could not repair a run that this worker does not run');
      }
    }
  }
}
