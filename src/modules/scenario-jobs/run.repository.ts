import { Injectable } from '@nestjs/common';
import { Database } from '../../infrastructure/database';
import { isUniqueViolation } from '../../infrastructure/database-errors';
import { newId } from '../../infrastructure/ids';
import { isTerminal, JOB_STATUSES, type JobStatus, type StopKind } from './job-status';
import { isLost, NOT_FINISHED } from './job.sql';

/** What a worker gets when it claims a job. */
export type ClaimedJob = {
  id: string;
  attempt: number;
  userEmail: string;
  prompt: string;
  context: string | null;
  scenarioSlug: string | null;
  requestId: string | null;
  /** Seconds since the job was created, if this is its first claim. */
  waitedSeconds: number | null;
};

/** One run of a job; only the newest may record anything. */
export type Run = { jobId: string; runId: string };

/** A run that is to begin, with the secret by which a doorbell proves that its job was cancelled. */
export type NewRun = Run & { stopToken: string };

/** What a task made; `content` is everything in its result except the name. */
export type NewScenario = { name: string; slug: string; content: Record<string, unknown> };

/** How many times `complete` tries to find a slug that no other job takes at the same moment. */
const SLUG_TRIES = 5;

/**
 * What a worker records of a run. As in `JobRepository`, each transition is one conditional statement; a run that is no
 * longer its job's newest fails the condition, and records nothing.
 */
@Injectable()
export class RunRepository {
  constructor(private readonly database: Database) {}

  /**
   * Claims the job for a run. A queued job becomes processing. If the job is processing and its worker has given no
   * sign of life for `lostMs`, this run takes over, and the earlier one can record nothing from now on. Otherwise
   * nothing happens: the job is `taken` by a living worker, whatever the queue believes, or `finished`, or `missing`.
   */
  async claim(run: NewRun, workerId: string, lostMs: number): Promise<ClaimedJob | 'taken' | 'finished' | 'missing'> {
    const { jobId, runId, stopToken } = run;
    const rows = await this.database.$queryRaw<ClaimedJob[]>`
      UPDATE scenario_jobs j
      SET status = 'processing', run_id = ${runId}::uuid, worker_id = ${workerId}, stop_token = ${stopToken}::uuid,
          attempt = attempt + 1, started_at = COALESCE(started_at, now())
      WHERE j.id = ${jobId} AND ${NOT_FINISHED} AND (j.status = 'queued' OR ${isLost(lostMs)})
      RETURNING id, attempt, user_email AS "userEmail", prompt, context, scenario_slug AS "scenarioSlug",
                request_id AS "requestId",
                CASE WHEN started_at = now()::timestamptz(3)
                     THEN EXTRACT(EPOCH FROM started_at - created_at)::float8 END AS "waitedSeconds"`;
    if (rows[0]) return rows[0];
    // The job may have been requeued since; the next try can then claim it.
    const job = await this.database.job.findUnique({ where: { id: jobId }, select: { status: true } });
    if (!job) return 'missing';
    return isTerminal(job.status) ? 'finished' : 'taken';
  }

  /**
   * Records a run's scenario and completes its job, both or neither. Returns false if the run may record nothing,
   * because the job was cancelled or another run has taken over; the scenario is then not kept either.
   */
  async complete({ jobId, runId }: Run, scenario: NewScenario): Promise<boolean> {
    for (let tries = 1; ; tries++) {
      const id = newId();
      try {
        const rows = await this.database.$queryRaw<unknown[]>`
          WITH done AS (
            UPDATE scenario_jobs SET status = 'completed', completed_at = GREATEST(now(), started_at)
            WHERE id = ${jobId} AND status = 'processing' AND run_id = ${runId}::uuid
            RETURNING id, workspace_id
          )
          INSERT INTO scenarios (id, workspace_id, job_id, slug, name, content)
          SELECT ${id}, done.workspace_id, done.id,
                 CASE WHEN EXISTS (SELECT FROM scenarios s WHERE s.workspace_id = done.workspace_id AND s.slug = ${scenario.slug})
                      THEN ${`${scenario.slug}-${id}`} ELSE ${scenario.slug} END,
                 ${scenario.name}, ${JSON.stringify(scenario.content)}::jsonb
          FROM done
          RETURNING id`;
        return rows.length > 0;
      } catch (error) {
        // Two jobs chose the same slug at the same moment: the next try sees the other's.
        if (!isUniqueViolation(error, 'scenarios_workspace_id_slug') || tries === SLUG_TRIES) throw error;
      }
    }
  }

  /** Records that a run failed for good. Returns false if the run may record nothing. */
  async fail({ jobId, runId }: Run, error: { code: string; message: string }): Promise<boolean> {
    const rows = await this.database.$queryRaw<unknown[]>`
      UPDATE scenario_jobs
      SET status = 'failed', completed_at = GREATEST(now(), started_at),
          error_code = ${error.code}, error_message = ${error.message}
      WHERE id = ${jobId} AND status = 'processing' AND run_id = ${runId}::uuid
      RETURNING id`;
    return rows.length > 0;
  }

  /**
   * Requeues a job whose run failed in a way that may pass, was interrupted, or is lost. Returns false if the run may
   * record nothing.
   */
  async requeue({ jobId, runId }: Run, { countsAsAttempt }: { countsAsAttempt: boolean }): Promise<boolean> {
    const rows = await this.database.$queryRaw<unknown[]>`
      UPDATE scenario_jobs
      SET status = 'queued', run_id = NULL, worker_id = NULL, stop_token = NULL,
          attempt = GREATEST(attempt - ${countsAsAttempt ? 0 : 1}::int, 0)
      WHERE id = ${jobId} AND status = 'processing' AND run_id = ${runId}::uuid
      RETURNING id`;
    return rows.length > 0;
  }

  /**
   * Records that the process of a cancelled run is gone, and how it ended. Returns the seconds since the cancel, or
   * undefined if this was recorded before or the run was not cancelled.
   */
  async confirmStopped({ jobId, runId }: Run, how: StopKind): Promise<number | undefined> {
    const rows = await this.database.$queryRaw<{ seconds: number }[]>`
      UPDATE scenario_jobs SET stopped_at = GREATEST(clock_timestamp(), completed_at), stopped_how = ${how}::stop_kind
      WHERE id = ${jobId} AND status = 'cancelled' AND run_id = ${runId}::uuid AND stopped_at IS NULL
      RETURNING EXTRACT(EPOCH FROM stopped_at - completed_at)::float8 AS seconds`;
    return rows[0]?.seconds;
  }

  /** Whether the job is processing and still belongs to this run. */
  async isProcessing({ jobId, runId }: Run): Promise<boolean> {
    return (await this.database.job.count({ where: { id: jobId, runId, status: 'processing' } })) > 0;
  }

  /** How the run's job ended, or null if it did not end with this run. */
  async findEnd({ jobId, runId }: Run): Promise<{ status: JobStatus; errorCode: string | null } | null> {
    return this.database.job.findFirst({
      where: { id: jobId, runId, status: { in: JOB_STATUSES.filter(isTerminal) } },
      select: { status: true, errorCode: true },
    });
  }
}
