import { Prisma } from '../../generated/prisma/client';

// Conditions on a job `j` that statements of several repositories share.

/**
 * The job is not finished, in a form that no index serves, so that the job is reached by its primary key. With old
 * statistics, or none, Postgres would take another way for equally short. Not `status IN ('queued', 'processing')`,
 * which is the condition of the index `scenario_jobs_unfinished`: all of that index would be read for each job.
 */
export const NOT_FINISHED = Prisma.sql`j.status NOT IN ('completed', 'failed', 'cancelled')`;

/** A run for which a worker still owes an answer: the condition of the index `scenario_jobs_owed_by_worker`. */
export const OWED = Prisma.sql`(j.worker_id IS NOT NULL AND j.status IN ('processing', 'cancelled') AND j.stopped_at IS NULL)`;

/** The worker of a job `j` has given no sign of life for `lostMs`, or has said that it ends. */
export const isLost = (lostMs: number) => Prisma.sql`NOT EXISTS (
  SELECT FROM workers w WHERE w.id = j.worker_id AND w.seen_at > now() - ${lostMs}::int * interval '1 ms')`;
