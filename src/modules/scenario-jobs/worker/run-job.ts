import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable } from '@nestjs/common';
import { SETTINGS_TOKEN, type Settings } from '../../../config/settings';
import { isDatabaseUnavailable } from '../../../infrastructure/database-errors';
import { LOGGER, type Logger } from '../../../infrastructure/logger';
import { Metrics } from '../../../infrastructure/metrics';
import { type StopKind } from '../job-status';
import { type ClaimedJob, type Run, RunRepository } from '../run.repository';
import { ActiveRun, ActiveRuns } from './active-runs';
import { atMostEvery } from './at-most-every';
import { PROGRESS_EVERY_MS, type StopReason } from './task-messages';
import { parseResult } from './task-result';
import { type TaskEnd, TaskProcess } from './task-process';
import { Watchdog } from './watchdog';
import { WORKER_ID } from './worker-id';

/** What became of a run. */
export type Outcome =
  /** Nothing ran: the job is finished, was cancelled before it began, or never existed. */
  | { kind: 'refused' }
  /** Nothing ran: another run has the job, and its worker lives. */
  | { kind: 'taken' }
  | { kind: 'completed' }
  | { kind: 'failed'; code: string }
  /** The job was cancelled, and the process is gone. */
  | { kind: 'cancelled'; how: StopKind }
  /** Another run has taken over. */
  | { kind: 'superseded' }
  /** An error that may pass: the job is queued again, to run after the delay. */
  | { kind: 'retry'; delayMs: number }
  /** Cut short through no fault of the job, which is queued again. */
  | { kind: 'interrupted' };

/** Why a run did not end by itself. `frozen`: this worker was frozen, and its watchdog has ended the task. */
type Reason = StopReason | 'frozen';

/** Why a run was stopped, if it was, and how its process ended. */
type Stop = { reason: Reason | undefined; how: StopKind };

type RunError = { code: string; message: string };

/**
 * Signals that ask a process to end and that we did not send: somebody is ending everything, perhaps the worker too.
 */
const FROM_OUTSIDE = new Set<NodeJS.Signals | null>(['SIGTERM', 'SIGINT', 'SIGHUP']);
const NOT_BEGUN: Stop = { reason: undefined, how: 'graceful' };

const MAX_BACKOFF_MS = 60_000;
const RECORD_AGAIN_AFTER_MS = 250;

const BUILT_IN_TASK = require.resolve('../tasks/generate-scenario');

/** Runs a job once: claims it, runs its task, records how it ended. */
@Injectable()
export class RunJob {
  constructor(
    private readonly repository: RunRepository,
    private readonly runs: ActiveRuns,
    private readonly watchdog: Watchdog,
    private readonly metrics: Metrics,
    @Inject(WORKER_ID) private readonly workerId: string,
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {
    // An alert on the first of these needs the counter to have been zero before.
    for (const status of ['completed', 'failed']) this.metrics.finished.inc({ status }, 0);
  }

  async run(jobId: string): Promise<Outcome> {
    // The run is known here before Postgres knows it, so that a cancel that comes at once finds it.
    const run = new ActiveRun(jobId);
    return this.runs.during(run, () => this.claimAndRun(run));
  }

  private async claimAndRun(run: ActiveRun): Promise<Outcome> {
    const logger = this.logger.child({ jobId: run.jobId, runId: run.runId });
    const job = await this.claim(run);
    if (job === 'taken') {
      logger.debug('run refused: the job is run by a worker that lives');
      return { kind: 'taken' };
    }
    if (job === 'missing') {
      logger.warn(
        'run refused: this database has no such job; does another one use this queue, by the same QUEUE_PREFIX?',
      );
    } else if (job === 'finished') logger.debug('run refused: the job is finished');
    if (typeof job === 'string') return { kind: 'refused' };
    run.claimed = true;
    if (job.waitedSeconds !== null) this.metrics.waitSeconds.observe(job.waitedSeconds);
    if (job.attempt > this.settings.MAX_ATTEMPTS) {
      const lost = { code: 'WORKER_LOST', message: 'The job was given up: none of its attempts had a result' };
      return this.record(run, logger, NOT_BEGUN, () => this.fail(run, lost));
    }
    // If the run was stopped before Postgres answered the claim, nothing begins.
    const stopped = run.reason;
    if (stopped) {
      return this.record(run, logger, { ...NOT_BEGUN, reason: stopped }, () => this.settleStopped(run, stopped));
    }
    const began = performance.now();
    this.metrics.runs.inc();
    try {
      const { end, how, reason } = await this.runTask(run, job, logger);
      const ms = Math.round(performance.now() - began);
      logger.info({ ms, ...(reason && { reason, how }), end: brief(end) }, 'task ended');
      const outcome = await this.record(run, logger, { reason, how }, () =>
        reason ? this.settleStopped(run, reason) : this.settle(run, job, end),
      );
      this.metrics.runSeconds.observe({ outcome: outcome.kind }, ms / 1000);
      return outcome;
    } finally {
      this.metrics.runs.dec();
    }
  }

  private async claim(run: ActiveRun) {
    try {
      return await this.repository.claim(run, this.workerId, this.settings.WORKER_LOST_MS);
    } catch (error) {
      // The claim may have been committed all the same.
      this.runs.rememberNeverBegun(run);
      throw error;
    }
  }

  private async runTask(run: ActiveRun, job: ClaimedJob, logger: Logger) {
    const { settings } = this;
    const progress = atMostEvery<unknown>(PROGRESS_EVERY_MS, (last) =>
      logger.info({ progress: last }, 'task progress'),
    );
    const task = this.newTask(run, logger, progress.take);
    if (!task) return { ...NOT_BEGUN, end: { kind: 'not started' } as const };
    // In this order, so that there is no moment at which the task computes and only this worker could end it.
    this.watchdog.watch(task.tree);
    run.attach(task);
    void task.ready.then(() => this.begin(run, task, job, logger));
    logger.info({ to: 'processing', attempt: job.attempt, taskPid: task.tree.groupId }, 'run began');
    // A result that has arrived but is not yet read was in time.
    const timeout = setTimeout(() => setImmediate(() => run.stop('timeout')), settings.TASK_TIMEOUT_MS);
    try {
      const { end, how } = await task.ended;
      const frozen = this.watchdog.hasKilled(run.runId);
      if (frozen) logger.error('this worker was frozen, and its watchdog has ended the task');
      const cutShort = frozen && (end.kind === 'exited' || end.kind === 'not started');
      // Read once, here: a reason that comes later does not make the result of this run worth less.
      const reason = run.reason ?? (cutShort ? ('frozen' as const) : undefined);
      return { end, how: frozen ? ('killed' as const) : how, reason };
    } finally {
      clearTimeout(timeout);
      progress.flush();
      this.watchdog.forget(task.tree);
    }
  }

  /**
   * Has the task begin. A worker that was frozen since its claim may have lost the job, and had no process that its
   * watchdog could end, so it asks Postgres first. If it freezes after this, there is such a process.
   */
  private async begin(run: ActiveRun, task: TaskProcess, job: ClaimedJob, logger: Logger): Promise<void> {
    const { SCENARIO_TASK = BUILT_IN_TASK, WATCHDOG_MS } = this.settings;
    try {
      const isOld = performance.now() - run.began > WATCHDOG_MS;
      if (!isOld || (await this.repository.isProcessing(run))) task.start(SCENARIO_TASK, inputOf(job));
      else run.stop('superseded');
    } catch (error) {
      logger.warn({ err: error }, 'could not ask whether the job must still run');
      run.stop('interrupted');
    }
  }

  /** Starts a process for the run. Returns undefined if the system refuses one, which it can do in several ways. */
  private newTask(run: Run, logger: Logger, onProgress: (progress: unknown) => void): TaskProcess | undefined {
    const { settings } = this;
    try {
      return new TaskProcess({
        runId: run.runId,
        memoryMb: settings.TASK_MEMORY_MB,
        inherit: settings.TASK_ENV ?? [],
        stop: { ackMs: settings.STOP_ACK_MS, graceMs: settings.STOP_GRACE_MS, killMs: settings.STOP_KILL_MS },
        onProgress,
        onOutput: (line, stream) => logger.info({ stream, line }, 'task output'),
        onSurvivors: (pids) => logger.error({ pids }, 'processes of the task are still alive after SIGKILL'),
        onBlind: () => logger.error('too few file descriptors to see whether the task is dead, will keep trying'),
      });
    } catch (error) {
      logger.error({ err: error }, 'the system refused a process for the task');
      return undefined;
    }
  }

  /**
   * Records that the run was stopped. Returns undefined if it may record nothing: the job was cancelled or taken over.
   */
  private async settleStopped(run: ActiveRun, reason: Reason): Promise<Outcome | undefined> {
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
  private async settle(run: ActiveRun, job: ClaimedJob, end: TaskEnd): Promise<Outcome | undefined> {
    switch (end.kind) {
      case 'returned': {
        const { scenario, error } = parseResult(end.result);
        if (error) return this.fail(run, error);
        return (await this.repository.complete(run, scenario)) ? { kind: 'completed' } : undefined;
      }
      case 'threw':
        return end.error.retryable ? this.retry(run, job, end.error) : this.fail(run, end.error);
      case 'not started':
        return this.retry(run, job, { code: 'TASK_CRASHED', message: 'The task could not be started' });
      case 'exited': {
        const error = describeExit(end, this.settings.TASK_MEMORY_MB);
        return FROM_OUTSIDE.has(end.signal) ? this.retry(run, job, error) : this.fail(run, error);
      }
    }
  }

  /** Has the job run again later, unless this was its last attempt. */
  private async retry(run: Run, { attempt }: ClaimedJob, error: RunError): Promise<Outcome | undefined> {
    if (attempt >= this.settings.MAX_ATTEMPTS) return this.fail(run, error);
    if (!(await this.repository.requeue(run, { countsAsAttempt: true }))) return undefined;
    return { kind: 'retry', delayMs: this.backoff(attempt) };
  }

  private async fail(run: Run, error: RunError): Promise<Outcome | undefined> {
    return (await this.repository.fail(run, error)) ? { kind: 'failed', code: error.code } : undefined;
  }

  private async interrupt(run: Run, attempt: { countsAsAttempt: boolean }): Promise<Outcome | undefined> {
    return (await this.repository.requeue(run, attempt)) ? { kind: 'interrupted' } : undefined;
  }

  /**
   * Records a run's end with `settle`. If the row refuses it, the job was cancelled, which is then confirmed, or taken
   * over. Waits for a Postgres that is away, because the work is done; but not forever: then the run counts as lost.
   */
  private async record(
    run: ActiveRun,
    logger: Logger,
    { reason, how }: Stop,
    settle: () => Promise<Outcome | undefined>,
  ): Promise<Outcome> {
    const outcome = (await this.whenPostgresAnswers(settle)) ?? (await this.explain(run, how));
    if (outcome.kind === 'completed' || outcome.kind === 'failed') this.metrics.finished.inc({ status: outcome.kind });
    const refused = outcome.kind === 'cancelled' || outcome.kind === 'superseded';
    if (refused && !reason) this.metrics.lateResults.inc();
    const { kind, ...details } = outcome;
    logger[kind === 'failed' ? 'warn' : 'info']({ from: 'processing', outcome: kind, ...details }, 'run ended');
    return outcome;
  }

  private async explain(run: ActiveRun, how: StopKind): Promise<Outcome> {
    // While a process of the run lives on that cannot be killed, the run keeps its place, and no stop is confirmed.
    await run.gone();
    return this.whenPostgresAnswers(() => this.confirmOrExplain(run, how));
  }

  private async confirmOrExplain(run: ActiveRun, how: StopKind): Promise<Outcome> {
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

/** What the task gets: the fields of the create request under the API's names, and the job's id. */
function inputOf(job: ClaimedJob): Record<string, unknown> {
  return {
    job_id: job.id,
    user_email: job.userEmail,
    prompt: job.prompt,
    context: job.context,
    scenario_slug: job.scenarioSlug,
    request_id: job.requestId,
  };
}

function describeExit(end: Extract<TaskEnd, { kind: 'exited' }>, memoryMb: number) {
  if (end.outOfMemory)
    return { code: 'TASK_OUT_OF_MEMORY', message: `The task used more than ${memoryMb} MB of memory` };
  if (end.signal) return { code: 'TASK_CRASHED', message: `The task was ended by ${end.signal}` };
  if (end.code === 0) return { code: 'TASK_NO_RESULT', message: 'The task ended without a result' };
  return { code: 'TASK_CRASHED', message: `The task ended with exit code ${end.code}` };
}

/** The end of a task without its result. */
function brief(end: TaskEnd) {
  return end.kind === 'returned' ? { kind: end.kind } : end;
}
