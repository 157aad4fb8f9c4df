import { Prisma } from '../../generated/prisma/client';

// Conditions on a job `j` that statements of several repositories have in common.

/**
 * Two conditions in a form that no index serves, so that a job is reached by its primary key. With old statistics, or
 * none, Postgres would think another way as short. Not `status IN ('queued', 'processing')`, which is the condition of
 * the index `scenario_jobs_unfinished`: all of that would be read for each job.
 */
export const NOT_FINISHED = Prisma.sql`j.status NOT IN ('completed', 'failed', 'cancelled')`;

/** A run that some worker still owes an answer for: the condition of the index `scenario_jobs_owed_by_worker`. */
export const OWED = Prisma.sql`(j.worker_id IS NOT NULL AND j.status IN ('processing', 'cancelled') AND j.stopped_at IS NULL)`;

/** The worker of a job `j` has not been heard of for `lostMs`, or has said that it ends. */
export const isLost = (lostMs: number) => Prisma.sql`NOT EXISTS (
  SELECT FROM workers w WHERE w.id = j.worker_id AND w.seen_at > now() - ${lostMs}::int * interval '1 ms')`;
