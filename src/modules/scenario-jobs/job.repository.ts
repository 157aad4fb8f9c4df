import { Injectable } from '@nestjs/common';
import { KEY_WORKS } from '../../auth/api-key.repository';
import { type Caller } from '../../auth/caller';
import { Prisma } from '../../generated/prisma/client';
import { Batches } from '../../infrastructure/batches';
import { Database } from '../../infrastructure/database';
import { isDatabaseUnavailable } from '../../infrastructure/database-errors';
import { isId, newId } from '../../infrastructure/ids';
import { type JobCounts } from '../../infrastructure/metrics';
import { type JobStatus } from './job-status';
import { NOT_FINISHED, OWED } from './job.sql';

/** A job as its callers see it, before it is formatted for HTTP. */
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

/** What a create request asks for. */
export type NewJob = {
  userEmail: string;
  prompt: string;
  context: string | null;
  scenarioSlug: string | null;
  requestId: string | null;
};

/** Which job is asked for, and the hash of the API key that asks. */
type JobRequest = { keyHash: string; jobId: string };

/** A job, the caller who asks for it, and the idempotency key of the request that cancelled it. */
type FoundJob = { job: JobRow; caller: Caller; cancelIdempotencyKey: string | null };

type CancelRequest = JobRequest & { idempotencyKey: string | null };

/** A job that a request has cancelled, and the run that must stop if one had begun. */
export type CancelledJob = {
  job: JobRow & { completedAt: Date };
  caller: Caller;
  run: { id: string; workerId: string; stopToken: string | null } | null;
};

const JOB = Prisma.sql`j.id, j.status::text AS status, j.error_code AS "errorCode", j.error_message AS "errorMessage",
  j.created_at AS "createdAt", j.started_at AS "startedAt", j.completed_at AS "completedAt"`;
const NO_SCENARIO = Prisma.sql`NULL AS "scenarioId", NULL AS "scenarioName", NULL AS "scenarioSlug"`;
const SCENARIO = Prisma.sql`s.id AS "scenarioId", s.name AS "scenarioName", s.slug AS "scenarioSlug"`;

/** What was found for one of several requests: the `ordinal`th of them, counting from 1. */
type AnswerTo = Caller & { ordinal: number };
type FoundRow = JobRow & AnswerTo & { cancelIdempotencyKey: string | null };
type CancelledTimes = Pick<CancelledJob['job'], 'id' | 'createdAt' | 'startedAt' | 'completedAt'>;
type CancelledRow = CancelledTimes &
  AnswerTo & { runId: string | null; workerId: string | null; stopToken: string | null };

/**
 * A job that was open until it was cancelled. Built field by field: with a spread, V8 would make a hidden class for
 * each job and keep it for longer than the job.
 */
const toCancelled = ({ id, createdAt, startedAt, completedAt }: CancelledTimes): CancelledJob['job'] => ({
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

/** The answers to `count` requests, in their order; undefined for a request that has no row. */
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

/** A request for a job; one that cancels it has an idempotency key as well. */
type Asked = JobRequest & Partial<CancelRequest>;

/**
 * The requests as rows. A single one, the usual case, costs less as `VALUES`; several cost less as arrays, with one
 * plan for any number.
 */
function asRows(requests: Asked[]): Prisma.Sql {
  const [first, ...others] = requests;
  if (first && others.length === 0) {
    return Prisma.sql`(VALUES (${first.jobId}, ${first.keyHash}, ${first.idempotencyKey ?? null}, 1))`;
  }
  return Prisma.sql`unnest(${requests.map(({ jobId }) => jobId)}::text[], ${requests.map(({ keyHash }) => keyHash)}::text[],
    ${requests.map(({ idempotencyKey }) => idempotencyKey ?? null)}::text[]) WITH ORDINALITY`;
}

/**
 * The jobs `j` of requests `r`, with the keys `k` and workspaces `w` that ask for them. `IS TRUE` keeps Postgres from
 * using the index of the workspace's jobs.
 */
function askedFor(requests: Asked[]): Prisma.Sql {
  return Prisma.sql`${asRows(requests)} AS r (job_id, key_hash, idempotency_key, ordinal)
    JOIN api_keys k ON k.hash = r.key_hash AND ${KEY_WORKS}
    JOIN workspaces w ON w.id = k.workspace_id AND w.active
    JOIN scenario_jobs j ON j.id = r.job_id AND (j.workspace_id = w.id) IS TRUE`;
}

const ANSWER_TO = Prisma.sql`r.ordinal::int AS ordinal, k.id AS "keyId", w.id AS "workspaceId", w.slug AS "workspaceSlug"`;

/**
 * What callers ask of jobs. A job's status is written only here and in the repositories of runs and of repairs. Each
 * transition is ONE conditional statement whose condition is the guard: what it returns says whether the transition
 * happened. Statements are raw SQL so that the clock of Postgres, not that of this machine, sets every time: durations
 * and the order of events then hold across machines.
 */
@Injectable()
export class JobRepository {
  private readonly finds = new Batches<JobRequest, FoundJob | undefined>((requests) => this.findTogether(requests));
  private readonly cancels = new Batches<CancelRequest, CancelledJob | undefined>((requests) =>
    this.cancelTogether(requests),
  );
  /** Repeats the requests of a failed batch, each by itself. */
  private readonly cancelsAlone = new Batches<CancelRequest, CancelledJob | undefined>(
    (requests) => this.cancelTogether(requests),
    { atOnce: 2, size: 1 },
  );

  constructor(private readonly database: Database) {}

  /**
   * Inserts a queued job. If the workspace already has a job with this `requestId`, whatever its status, inserts
   * nothing and returns that job with `isNew: false`. Does not wait for the workspace's row, which the new job refers
   * to: if somebody has locked it, nothing is inserted and nothing returned.
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
   * The job, if the key works and the job belongs to its workspace. The same statement looks up the key, and serves
   * other requests that come at this moment.
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
   * Decides a cancel, together with others that come at this moment and in one commit for all of them. A queued or
   * processing job is cancelled, and returned with its caller. Nothing is written or returned if the job is completed,
   * failed, cancelled (even by another of these requests), missing or another workspace's, or if the key does not work.
   * A run that finishes meanwhile has either recorded its result already, or finds the job cancelled and can record
   * nothing.
   *
   * The statement does not wait for locks: a job whose row, or whose key's row, somebody has locked at this moment is
   * left out as well, and must be asked for again.
   */
  async cancel(request: CancelRequest): Promise<CancelledJob | undefined> {
    if (!isId(request.jobId)) return undefined;
    try {
      return await this.cancels.call(request);
    } catch (error) {
      // If Postgres is unavailable, the batch may or may not be committed. Any other error may be due to another
      // request.
      if (isDatabaseUnavailable(error)) throw error;
      return this.cancelsAlone.call(request);
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

  /** How many jobs wait and run, and how many cancelled runs are not yet confirmed to be gone. */
  async countUnfinished(): Promise<JobCounts> {
    const [counts] = await this.database.$queryRaw<[JobCounts]>`
      SELECT
        (SELECT count(*) FROM scenario_jobs WHERE status = 'queued')::float8 AS queued,
        (SELECT count(*) FROM scenario_jobs WHERE status = 'processing')::float8 AS processing,
        (SELECT count(*) FROM scenario_jobs j WHERE ${OWED} AND j.status = 'cancelled')::float8 AS stopping`;
    return counts;
  }
}
