import { type BeforeApplicationShutdown, Inject, Injectable } from '@nestjs/common';
import { SETTINGS_TOKEN, type Settings } from '../../../config/settings';
import { LONGEST_STATEMENT_MS } from '../../../infrastructure/database';
import { LOGGER, type Logger } from '../../../infrastructure/logger';
import { within } from '../../../infrastructure/within';
import { WorkerRepository } from '../worker.repository';
import { ActiveRuns } from './active-runs';
import { CancelListener } from './cancel-listener';
import { QueueConsumer } from './queue-consumer';
import { Reconciler } from './reconciler';
import { SEES_PROCESSES } from './running-processes';
import { Watchdog } from './watchdog';
import { HEARTBEAT_MS } from './watchdog-messages';
import { WORKER_ID } from './worker-id';

/** How long a worker waits for Postgres to record how its stopped runs have ended. */
const RECORD_MS = 2000;
/** How long a worker that ends may take to sign off from Postgres and Redis: nothing depends on that. */
const FAREWELL_MS = 5000;

/** Starts the parts of a worker, and stops them, each in its turn. */
@Injectable()
export class WorkerLifecycle implements BeforeApplicationShutdown {
  private ending = false;

  constructor(
    private readonly watchdog: Watchdog,
    private readonly listener: CancelListener,
    private readonly reconciler: Reconciler,
    private readonly consumer: QueueConsumer,
    private readonly runs: ActiveRuns,
    private readonly workers: WorkerRepository,
    @Inject(WORKER_ID) private readonly workerId: string,
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {}

  /** Called after everything else has started: a worker that fails to start must not have begun a run. */
  start(): void {
    if (this.ending) return; // Told to end while it was starting.
    this.warnOfOverlap();
    if (process.platform === 'linux' && !SEES_PROCESSES) {
      this.logger.warn(
        '/proc is missing, or that of another PID namespace: what leaves the group of its task lives on',
      );
    }
    this.watchdog.start();
    this.reconciler.start();
    this.listener.start();
    // A run that begins before its worker's first sign of life could be taken for one whose worker is lost.
    void this.listener.alive.then(() => this.consumer.start());
  }

  private warnOfOverlap(): void {
    const { WORKER_LOST_MS, BLIND_MS, CANCEL_POLL_MS, WATCHDOG_MS } = this.settings;
    const { STOP_ACK_MS, STOP_GRACE_MS, STOP_KILL_MS } = this.settings;
    const stopMs = STOP_ACK_MS + STOP_GRACE_MS + STOP_KILL_MS;
    const cutOffMs = BLIND_MS + CANCEL_POLL_MS + LONGEST_STATEMENT_MS + stopMs;
    const frozenMs = WATCHDOG_MS + CANCEL_POLL_MS + 2 * HEARTBEAT_MS;
    const leastMs = Math.max(cutOffMs, frozenMs);
    if (WORKER_LOST_MS >= leastMs) return;
    this.logger.warn({ leastMs }, 'WORKER_LOST_MS is short: a job may be run again while a lost worker still runs it');
  }

  async beforeApplicationShutdown(): Promise<void> {
    this.ending = true;
    await this.drain();
    // The watchdog begins to kill whatever it still watches: once this worker has signed off, others may take its jobs.
    this.watchdog.stop();
    await this.atMost(FAREWELL_MS, 'farewell', this.sayFarewell());
  }

  /** Lets the runs end by themselves for a while, then stops those that are left, whose jobs are queued again. */
  private async drain(): Promise<void> {
    await this.consumer.pause();
    if (this.runs.size > 0)
      this.logger.info({ runs: this.runs.size, waitMs: this.settings.DRAIN_MS }, 'waiting for runs');
    const { DRAIN_MS, STOP_ACK_MS, STOP_GRACE_MS, STOP_KILL_MS } = this.settings;
    const drained = await within(DRAIN_MS, 'drain', this.runs.settled()).then(
      () => true,
      () => false,
    );
    if (drained) return;
    this.logger.warn({ runs: this.runs.size }, 'stopping runs, their jobs are queued again');
    this.runs.stopAll('interrupted');
    await this.atMost(STOP_ACK_MS + STOP_GRACE_MS + STOP_KILL_MS, 'stopping runs', this.runs.gone());
    await this.atMost(RECORD_MS, 'recording how runs ended', this.runs.settled());
  }

  private async sayFarewell(): Promise<void> {
    await Promise.all([this.consumer.stop(), this.reconciler.stop(), this.listener.stop()]);
    await this.workers.reportGone(this.workerId);
  }

  private async atMost(milliseconds: number, what: string, work: Promise<unknown>): Promise<void> {
    await within(milliseconds, what, work).catch((error: unknown) =>
      this.logger.warn({ err: error }, `ending without: ${what}`),
    );
  }
}
