import { Injectable } from '@nestjs/common';
import { KEY_WORKS } from '../../auth/api-key.repository';
import { type Caller } from '../../auth/caller';
import { Prisma } from '../../generated/prisma/client';
import { Batches } from '../../infrastructure/batches';
import { Database } from '../../infrastructure/database';
import { isDatabaseUnavailable, isUniqueViolation } from '../../infrastructure/database-errors';
import { isId, newId } from '../../infrastructure/ids';
import { type JobCounts } from '../../infrastructure/metrics';
import { isCancellable, type JobStatus, type StopKind } from './job-status';

/** A job as its callers see it, before it is dressed for HTTP. */
export type JobRow = {
  id: string;
  status: JobStatus;
  errorCode: string | null;
  errorMessage: string | null;
  createdAt: Date;
  startedAt: Date | null;
  completedAt: Date | null;
  scenarioId: string | null;
  scenarioName: string | null;
  scenarioSlug: string | null;
};

/** What the caller of the create operation asks for. */
export type NewJob = {
  userEmail: string;
  prompt: string;
  context: string | null;
  scenarioSlug: string | null;
  requestId: string | null;
};

/** Which job is asked for, with the API key of this hash. */
type JobRequest = { keyHash: string; jobId: string };

/** A job, who asks for it, and the idempotency key of the request that cancelled it. */
type FoundJob = { job: JobRow; caller: Caller; cancelIdempotencyKey: string | null };

type CancelRequest = JobRequest & { idempotencyKey: string | null };

/** A job that a request has cancelled, and the run that must stop if one had begun. */
export type CancelledJob = {
  job: JobRow;
  caller: Caller;
  run: { id: string; workerId: string; stopToken: string | null } | null;
};

/** What a worker gets when it claims a job. */
export type ClaimedJob = {
  id: string;
  attempt: number;
  userEmail: string;
  prompt: string;
  context: string | null;
  scenarioSlug: string | null;
  requestId: string | null;
};

/** A run that a worker still owes an answer for: its result, or the word that its process is gone. */
export type OwedRun = {
  jobId: string;
  runId: string;
  status: 'processing' | 'cancelled';
  /** Seconds since the job was cancelled, by the clock of Postgres. */
  cancelledSeconds: number | null;
};

/** One run of a job; only the newest may record anything. */
export type Run = { jobId: string; runId: string };

/** A run that is to begin, with the secret by which a message to its worker proves that its job was cancelled. */
export type NewRun = Run & { stopToken: string };

/** What a task made; `content` is everything in its result but the name. */
export type NewScenario = { name: string; slug: string; content: Record<string, unknown> };

const JOB = Prisma.sql`j.id, j.status::text AS status, j.error_code AS "errorCode", j.error_message AS "errorMessage",
  j.created_at AS "createdAt", j.started_at AS "startedAt", j.completed_at AS "completedAt"`;
const NO_SCENARIO = Prisma.sql`NULL AS "scenarioId", NULL AS "scenarioName", NULL AS "scenarioSlug"`;
const SCENARIO = Prisma.sql`s.id AS "scenarioId", s.name AS "scenarioName", s.slug AS "scenarioSlug"`;

/** What was found for one of several requests: the `ordinal`th of them, from 1. */
type AnswerTo = Caller & { ordinal: number };
type FoundRow = JobRow & AnswerTo & { cancelIdempotencyKey: string | null };
type IdAndTimes = Pick<JobRow, 'id' | 'createdAt' | 'startedAt' | 'completedAt'>;
type CancelledRow = IdAndTimes & AnswerTo & { runId: string | null; workerId: string | null; stopToken: string | null };

/**
 * A job that was open until it was cancelled. Field by field: with a spread V8 would make a hidden class for each job, and
 * keep it for longer than the job.
 */
const toCancelled = ({ id, createdAt, startedAt, completedAt }: IdAndTimes): JobRow => ({
  id,
  status: 'cancelled',
  errorCode: null,
  errorMessage: null,
  createdAt,
  startedAt,
  completedAt,
  scenarioId: null,
  scenarioName: null,
  scenarioSlug: null,
});

/** The answer to each of so many requests, or nothing. */
function inOrder<Row extends AnswerTo, Found>(
  count: number,
  rows: Row[],
  toFound: (row: Omit<Row, keyof AnswerTo>, caller: Caller) => Found,
): (Found | undefined)[] {
  const answers = Array<Found | undefined>(count).fill(undefined);
  for (const { ordinal, keyId, workspaceId, workspaceSlug, ...row } of rows) {
    answers[ordinal - 1] = toFound(row, { keyId, workspaceId, workspaceSlug });
  }
  return answers;
}

/**
 * Two conditions in a form that no index serves, so that a job is reached by its primary key. With old statistics, or
 * none, Postgres would think another way as short. Not `status IN ('queued', 'processing')`, which is the condition of
 * the index `scenario_jobs_unfinished`: all of that would be read for each job.
 */
const NOT_FINISHED = Prisma.sql`j.status NOT IN ('completed', 'failed', 'cancelled')`;

/** A request for a job, of which a cancel has an idempotency key. */
type Asked = JobRequest & Partial<CancelRequest>;

/** Requests as rows. One alone, as most are, costs less as `VALUES`; many cost less as arrays, and have one plan. */
function asRows(requests: Asked[]): Prisma.Sql {
  const [first, ...others] = requests;
  if (first && others.length === 0) {
    return Prisma.sql`(VALUES (${first.jobId}, ${first.keyHash}, ${first.idempotencyKey ?? null}, 1))`;
  }
  return Prisma.sql`unnest(${requests.map(({ jobId }) => jobId)}::text[], ${requests.map(({ keyHash }) => keyHash)}::text[],
    ${requests.map(({ idempotencyKey }) => idempotencyKey ?? null)}::text[]) WITH ORDINALITY`;
}

/**
 * The jobs `j` of requests `r`, with the keys `k` and workspaces `w` that they are asked for with. `IS TRUE` keeps Postgres
 * off the index of the workspace's jobs.
 */
function askedFor(requests: Asked[]): Prisma.Sql {
  return Prisma.sql`${asRows(requests)} AS r (job_id, key_hash, idempotency_key, ordinal)
    JOIN api_keys k ON k.hash = r.key_hash AND ${KEY_WORKS}
    JOIN workspaces w ON w.id = k.workspace_id AND w.active
    JOIN scenario_jobs j ON j.id = r.job_id AND (j.workspace_id = w.id) IS TRUE`;
}

const ANSWER_TO = Prisma.sql`r.ordinal::int AS ordinal, k.id AS "keyId", w.id AS "workspaceId", w.slug AS "workspaceSlug"`;

/** A run that some worker still owes an answer for: the condition of the index `scenario_jobs_owed_by_worker`. */
const OWED = Prisma.sql`(j.worker_id IS NOT NULL AND j.status IN ('processing', 'cancelled') AND j.stopped_at IS NULL)`;

const OWED_RUN = Prisma.sql`j.id AS "jobId", j.run_id::text AS "runId", j.status::text AS status,
  EXTRACT(EPOCH FROM clock_timestamp() - j.completed_at)::float8 AS "cancelledSeconds"`;

/** The worker of a job `j` has not been heard of for `lostMs`, or has said that it ends. */
const isLost = (lostMs: number) => Prisma.sql`NOT EXISTS (
  SELECT FROM workers w WHERE w.id = j.worker_id AND w.seen_at > now() - ${lostMs}::int * interval '1 ms')`;

/** How often a scenario's slug may be taken away under our hands before `complete` gives up. */
const SLUG_TRIES = 5;

/**
 * The only writer of a job's status. Each transition is ONE conditional statement, whose condition is the
 * guard: what it returns says whether it happened. Statements are raw because the clock of Postgres, not
 * that of this machine, sets every time: durations and the order of events then hold across machines.
 */
@Injectable()
export class JobRepository {
  private readonly finds = new Batches<JobRequest, FoundJob | undefined>((requests) => this.findTogether(requests));
  private readonly cancels = new Batches<CancelRequest, CancelledJob | undefined>((requests) =>
    this.cancelTogether(requests),
  );

  constructor(private readonly database: Database) {}

  /**
   * Inserts a queued job. When the workspace already has a job with this `requestId`, whatever its status,
   * inserts nothing and returns that one with `isNew: false`. Nor does it wait for the workspace's row, which a job refers
   * to: nothing is inserted, and nothing returned, when somebody has locked that.
   */
  async create(workspaceId: string, job: NewJob): Promise<{ job: JobRow; isNew: boolean } | undefined> {
    const inserted = await this.database.$queryRaw<JobRow[]>`
      WITH w AS MATERIALIZED (SELECT id FROM workspaces WHERE id = ${workspaceId} FOR KEY SHARE SKIP LOCKED)
      INSERT INTO scenario_jobs AS j (id, workspace_id, user_email, prompt, context, scenario_slug, request_id)
      SELECT ${newId()}, w.id, ${job.userEmail}, ${job.prompt}, ${job.context}, ${job.scenarioSlug}, ${job.requestId} FROM w
      ON CONFLICT (workspace_id, request_id) DO NOTHING
      RETURNING ${JOB}, ${NO_SCENARIO}`;
    if (inserted[0]) return { job: inserted[0], isNew: true };
    const existing = job.requestId !== null && (await this.findByRequestId(workspaceId, job.requestId));
    return existing ? { job: existing, isNew: false } : undefined;
  }

  async findByRequestId(workspaceId: string, requestId: string): Promise<JobRow | undefined> {
    const rows = await this.database.$queryRaw<JobRow[]>`
      SELECT ${JOB}, ${SCENARIO} FROM scenario_jobs j LEFT JOIN scenarios s ON s.job_id = j.id
      WHERE j.workspace_id = ${workspaceId} AND j.request_id = ${requestId}`;
    return rows[0];
  }

  /**
   * The job, if the key works and the job is its workspace's. The key is looked up in the same statement, and so are
   * others that come at this moment.
   */
  async find(request: JobRequest): Promise<FoundJob | undefined> {
    return isId(request.jobId) ? this.finds.call(request) : undefined;
  }

  private async findTogether(requests: JobRequest[]): Promise<(FoundJob | undefined)[]> {
    const rows = await this.database.$queryRaw<FoundRow[]>`
      SELECT ${JOB}, ${SCENARIO}, ${ANSWER_TO}, j.cancel_idempotency_key AS "cancelIdempotencyKey"
      FROM ${askedFor(requests)} LEFT JOIN scenarios s ON s.job_id = j.id`;
    return inOrder(requests.length, rows, ({ cancelIdempotencyKey, ...job }, caller) => ({
      job,
      caller,
      cancelIdempotencyKey,
    }));
  }

  async scenarioExists(workspaceId: string, slug: string): Promise<boolean> {
    return (await this.database.scenario.count({ where: { workspaceId, slug } })) > 0;
  }

  /**
   * Decides a cancel, together with others that come at this moment and with one commit for all of them. queued,
   * processing: the job is cancelled and returned, with whoever cancelled it. completed, failed, cancelled (by another of
   * these requests, too), missing, another workspace's, or with a key that does not work: nothing is written and nothing
   * returned. A run that finishes while we ask either had its result in before, or finds the job cancelled and can record
   * nothing.
   *
   * Nor does it wait: a job whose row, or whose key's row, somebody has locked at this moment is left out as well, to be
   * asked for again.
   */
  async cancel(request: CancelRequest): Promise<CancelledJob | undefined> {
    if (!isId(request.jobId)) return undefined;
    try {
      return await this.cancels.call(request);
    } catch (error) {
      // Whether it was committed is not known then. Any other error may be due to another request.
      if (isDatabaseUnavailable(error)) throw error;
      return (await this.cancelTogether([request]))[0];
    }
  }

  private async cancelTogether(requests: CancelRequest[]): Promise<(CancelledJob | undefined)[]> {
    const rows = await this.database.$queryRaw<CancelledRow[]>`
      WITH asked AS MATERIALIZED (
        SELECT j.id, ${ANSWER_TO}, r.idempotency_key
        FROM ${askedFor(requests)}
        WHERE ${NOT_FINISHED}
        FOR UPDATE OF j SKIP LOCKED FOR KEY SHARE OF k SKIP LOCKED
      )
      UPDATE scenario_jobs AS j
      SET status = 'cancelled', completed_at = GREATEST(now(), j.started_at),
          cancelled_by = asked."keyId", cancel_idempotency_key = asked.idempotency_key
      FROM asked WHERE j.id = asked.id AND ${NOT_FINISHED}
      RETURNING j.id, j.created_at AS "createdAt", j.started_at AS "startedAt", j.completed_at AS "completedAt",
                j.run_id::text AS "runId", j.worker_id AS "workerId", j.stop_token::text AS "stopToken",
                asked.ordinal, asked."keyId", asked."workspaceId", asked."workspaceSlug"`;
    return inOrder(requests.length, rows, ({ runId, workerId, stopToken, ...job }, caller) => ({
      job: toCancelled(job),
      caller,
      run: runId && workerId ? { id: runId, workerId, stopToken } : null,
    }));
  }

  /**
   * Takes the job for a run. queued: it becomes processing. processing, and its worker has not been heard of for
   * `lostMs`: this run takes over; the earlier one can record nothing from now on. Otherwise nothing happens: the job is
   * `taken` by a worker that lives, whatever the queue thinks of it, or `finished`, or `missing`.
   */
  async claim(run: NewRun, workerId: string, lostMs: number): Promise<ClaimedJob | 'taken' | 'finished' | 'missing'> {
    const { jobId, runId, stopToken } = run;
    const rows = await this.database.$queryRaw<ClaimedJob[]>`
      UPDATE scenario_jobs j
      SET status = 'processing', run_id = ${runId}::uuid, worker_id = ${workerId}, stop_token = ${stopToken}::uuid,
          attempt = attempt + 1, started_at = COALESCE(started_at, now())
      WHERE j.id = ${jobId} AND ${NOT_FINISHED} AND (j.status = 'queued' OR ${isLost(lostMs)})
      RETURNING id, attempt, user_email AS "userEmail", prompt, context, scenario_slug AS "scenarioSlug",
                request_id AS "requestId"`;
    if (rows[0]) return rows[0];
    // It may have been requeued since: then it can be claimed at the next try.
    const job = await this.database.job.findUnique({ where: { id: jobId }, select: { status: true } });
    if (!job) return 'missing';
    return isCancellable(job.status) ? 'taken' : 'finished';
  }

  /**
   * Records a run's scenario and completes its job, both or neither. False when the run may record nothing:
   * the job was cancelled, or another run has taken over. Then the scenario is not kept either.
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

  /** Records that a run failed for good. False when the run may record nothing. */
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
   * Gives a job back to the queue: its run failed in a way that may pass, was interrupted, or is lost. False when the
   * run may record nothing.
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

  /** Gives lost runs back to the queue, but for rows that somebody has locked. */
  async requeueLost(runs: Run[]): Promise<void> {
    await this.database.$executeRaw`
      WITH lost AS MATERIALIZED (
        SELECT j.id
        FROM unnest(${runs.map(({ jobId }) => jobId)}::text[], ${runs.map(({ runId }) => runId)}::uuid[]) AS r (job_id, run_id)
        JOIN scenario_jobs j ON j.id = r.job_id AND j.run_id = r.run_id
        WHERE j.status = 'processing'
        FOR UPDATE OF j SKIP LOCKED
      )
      UPDATE scenario_jobs j SET status = 'queued', run_id = NULL, worker_id = NULL, stop_token = NULL
      FROM lost WHERE j.id = lost.id AND j.status = 'processing'`;
  }

  /** Those of the jobs that are queued at this moment. */
  async queuedAmong(jobIds: string[]): Promise<Set<string>> {
    if (jobIds.length === 0) return new Set();
    const rows = await this.database.$queryRaw<{ id: string }[]>`
      SELECT j.id FROM unnest(${jobIds}::text[]) AS asked (id) JOIN scenario_jobs j ON j.id = asked.id
      WHERE j.status = 'queued'`;
    return new Set(rows.map(({ id }) => id));
  }

  /**
   * Records that the process of a cancelled run is gone, and how it ended. Returns the seconds since the
   * cancel, or nothing when this was recorded before or the run was not cancelled.
   */
  async confirmStopped({ jobId, runId }: Run, how: StopKind): Promise<number | undefined> {
    const rows = await this.database.$queryRaw<{ seconds: number }[]>`
      UPDATE scenario_jobs SET stopped_at = GREATEST(clock_timestamp(), completed_at), stopped_how = ${how}::stop_kind
      WHERE id = ${jobId} AND status = 'cancelled' AND run_id = ${runId}::uuid AND stopped_at IS NULL
      RETURNING EXTRACT(EPOCH FROM stopped_at - completed_at)::float8 AS seconds`;
    return rows[0]?.seconds;
  }

  /** Whether the job is still this run's. */
  async isProcessing({ jobId, runId }: Run): Promise<boolean> {
    return (await this.database.job.count({ where: { id: jobId, runId, status: 'processing' } })) > 0;
  }

  /** What the run's job ended as, if it ended with this run. */
  async findEnd({ jobId, runId }: Run): Promise<{ status: JobStatus; errorCode: string | null } | null> {
    return this.database.job.findFirst({
      where: { id: jobId, runId, status: { in: ['completed', 'failed', 'cancelled'] } },
      select: { status: true, errorCode: true },
    });
  }

  /** Confirms `worker_lost` for every cancelled run whose worker is lost, but for rows that somebody has locked. */
  async confirmLost(lostMs: number): Promise<Run[]> {
    return this.database.$queryRaw<Run[]>`
      WITH lost AS MATERIALIZED (
        SELECT j.id FROM scenario_jobs j
        WHERE ${OWED} AND j.status = 'cancelled' AND j.completed_at < now() - ${lostMs}::int * interval '1 ms'
          AND ${isLost(lostMs)}
        FOR UPDATE SKIP LOCKED
      )
      UPDATE scenario_jobs j SET stopped_at = clock_timestamp(), stopped_how = 'worker_lost'
      FROM lost WHERE j.id = lost.id AND j.stopped_at IS NULL
      RETURNING j.id AS "jobId", j.run_id::text AS "runId"`;
  }

  /** Every run that the worker still owes an answer for. */
  async findOwed(workerId: string): Promise<OwedRun[]> {
    return this.database.$queryRaw<OwedRun[]>`
      SELECT ${OWED_RUN} FROM scenario_jobs j WHERE j.worker_id = ${workerId} AND ${OWED}`;
  }

  /** The same, and renews the worker's sign of life. */
  async reportAlive(workerId: string): Promise<OwedRun[]> {
    return this.database.$queryRaw<OwedRun[]>`
      WITH alive AS (
        INSERT INTO workers (id) VALUES (${workerId}) ON CONFLICT (id) DO UPDATE SET seen_at = now()
      )
      SELECT ${OWED_RUN} FROM scenario_jobs j WHERE j.worker_id = ${workerId} AND ${OWED}`;
  }

  /** Takes back the sign of life: the worker ends and owes nothing any more. */
  async reportGone(workerId: string): Promise<void> {
    await this.database.worker.deleteMany({ where: { id: workerId } });
  }

  /** Forgets workers that have not been heard of for a day and owe no answer. */
  async forgetOldWorkers(): Promise<void> {
    await this.database.$executeRaw`
      DELETE FROM workers w WHERE w.seen_at < now() - interval '1 day' AND NOT EXISTS (
        SELECT FROM scenario_jobs j WHERE j.worker_id = w.id AND ${OWED})`;
  }

  /**
   * Up to `limit` jobs that the queue must know, by id after `after`: queued ones at least `ageMs` old, and
   * processing ones whose worker has not been heard of for `lostMs`.
   */
  async findDependingOnQueue(after: string, limit: number, ageMs: number, lostMs: number) {
    // One status at a time: so the index of unfinished jobs is in order, and no finished row is looked at.
    return this.database.$queryRaw<{ jobId: string; runId: string | null }[]>`
      (SELECT j.id AS "jobId", j.run_id::text AS "runId" FROM scenario_jobs j
       WHERE j.status = 'queued' AND j.id > ${after} AND j.created_at < now() - ${ageMs}::int * interval '1 ms'
       ORDER BY j.id LIMIT ${limit}::int)
      UNION ALL
      (SELECT j.id AS "jobId", j.run_id::text AS "runId" FROM scenario_jobs j
       WHERE j.status = 'processing' AND j.id > ${after} AND ${isLost(lostMs)}
       ORDER BY j.id LIMIT ${limit}::int)
      ORDER BY "jobId" LIMIT ${limit}::int`;
  }

  /** How many jobs wait and run, and how many cancelled runs are not yet confirmed to be gone. */
  async countUnfinished(): Promise<JobCounts> {
    const [counts] = await this.database.$queryRaw<[JobCounts]>`
      SELECT
        (SELECT count(*) FROM scenario_jobs WHERE status = 'queued')::float8 AS queued,
        (SELECT count(*) FROM scenario_jobs WHERE status = 'processing')::float8 AS processing,
        (SELECT count(*) FROM scenario_jobs j WHERE ${OWED} AND j.status = 'cancelled')::float8 AS stopping`;
    return counts;
  }

  /**
   * Runs `work`, for no longer than `limitMs`, unless another process is running it. The lock is Postgres's own and ends
   * with the transaction, so a dead process holds nothing; and Postgres ends the transaction of a frozen one.
   */
  async exclusively(work: () => Promise<void>, limitMs: number): Promise<void> {
    await this.database.$transaction(
      async (transaction) => {
        const [lock] = await transaction.$queryRaw<[{ mine: boolean }]>`
          SELECT pg_try_advisory_xact_lock(hashtext('scenario-jobs reconciler')) AS mine,
            set_config('idle_in_transaction_session_timeout', ${String(limitMs)}, true) AS "limitMs"`;
        if (lock.mine) await work();
      },
      { timeout: limitMs },
    );
  }
}
