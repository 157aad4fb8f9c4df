import { Inject, Injectable } from '@nestjs/common';
import { SETTINGS_TOKEN, type Settings } from '../../../config/settings';
import { LOGGER, type Logger } from '../../../infrastructure/logger';
import { Metrics } from '../../../infrastructure/metrics';
import { type ClaimedJob, type Run, RunRepository } from '../run.repository';
import { ActiveRun, ActiveRuns } from './active-runs';
import { atMostEvery } from './at-most-every';
import { type Recorded, RecordRun, type RunEnd } from './record-run';
import { PROGRESS_EVERY_MS } from './task-messages';
import { TaskProcess } from './task-process';
import { Watchdog } from './watchdog';
import { WORKER_ID } from './worker-id';

/** What became of a run. */
export type Outcome =
  /** Nothing ran: the job is finished, was cancelled before it began, or never existed. */
  | { kind: 'refused' }
  /** Nothing ran: another run has the job, and its worker lives. */
  | { kind: 'taken' }
  | Recorded;

const GIVEN_UP: RunEnd = { end: { kind: 'given up' }, reason: undefined, how: 'graceful' };
const NOT_STARTED: RunEnd = { ...GIVEN_UP, end: { kind: 'not started' } };

const BUILT_IN_TASK = require.resolve('../tasks/generate-scenario');

/** Runs a job once: claims it, runs its task, records how it ended. */
@Injectable()
export class RunJob {
  constructor(
    private readonly repository: RunRepository,
    private readonly runs: ActiveRuns,
    private readonly watchdog: Watchdog,
    private readonly recordRun: RecordRun,
    private readonly metrics: Metrics,
    @Inject(WORKER_ID) private readonly workerId: string,
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {
    // An alert on the first of these needs the counter to have been zero before.
    metrics.runSeconds.zero({ outcome: 'not_started' });
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
    if (job.attempt > this.settings.MAX_ATTEMPTS) return this.recordRun.record(run, job, GIVEN_UP, logger);
    // If the run was stopped before Postgres answered the claim, nothing begins.
    const { reason } = run;
    if (reason) return this.recordRun.record(run, job, { ...NOT_STARTED, reason }, logger);
    const began = performance.now();
    this.metrics.runs.inc();
    try {
      const ended = await this.runTask(run, job, logger);
      const { end, reason, how } = ended;
      const ms = Math.round(performance.now() - began);
      logger.info({ ms, ...(reason && { reason, how }), end: brief(end) }, 'task ended');
      const outcome = await this.recordRun.record(run, job, ended, logger);
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

  private async runTask(run: ActiveRun, job: ClaimedJob, logger: Logger): Promise<RunEnd> {
    const { settings } = this;
    const progress = atMostEvery<unknown>(PROGRESS_EVERY_MS, (last) =>
      logger.info({ progress: last }, 'task progress'),
    );
    const task = this.newTask(run, logger, progress.take);
    if (!task) return NOT_STARTED;
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
      const reason = run.reason ?? (cutShort ? 'frozen' : undefined);
      return { end, reason, how: frozen ? 'killed' : how };
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

/** The end of a task without its result. */
function brief(end: RunEnd['end']) {
  return end.kind === 'returned' ? { kind: end.kind } : end;
}
