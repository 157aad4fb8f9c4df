import { Injectable } from '@nestjs/common';
import { Database } from '../../infrastructure/database';
import { isLost, OWED } from './job.sql';
import { type Run } from './run.repository';

/** What the reconciler looks for and repairs. A job that somebody else has locked is left to the next pass. */
@Injectable()
export class RepairRepository {
  constructor(private readonly database: Database) {}

  /**
   * Runs `work` unless another process is running it. The lock is Postgres's own and ends with the transaction, so a
   * dead process holds nothing. It lasts at most `limitMs`, even if the process freezes; work that takes longer goes on
   * without it.
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

  /** Confirms `worker_lost` for every cancelled run whose worker is lost. */
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

  /**
   * Up to `limit` jobs that the queue must know, with ids after `after`: queued jobs at least `ageMs` old, and
   * processing ones whose worker has given no sign of life for `lostMs`.
   */
  async findDependingOnQueue(after: string, limit: number, ageMs: number, lostMs: number) {
    // One status at a time, so that the index of unfinished jobs is read in order and no finished row is read.
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

  /** Requeues the jobs of these runs if their worker has still given no sign of life for `lostMs`. */
  async requeueLost(runs: Run[], lostMs: number): Promise<void> {
    await this.database.$executeRaw`
      WITH lost AS MATERIALIZED (
        SELECT j.id
        FROM unnest(${runs.map(({ jobId }) => jobId)}::text[], ${runs.map(({ runId }) => runId)}::uuid[]) AS r (job_id, run_id)
        JOIN scenario_jobs j ON j.id = r.job_id AND j.run_id = r.run_id
        WHERE j.status = 'processing' AND ${isLost(lostMs)}
        FOR UPDATE OF j SKIP LOCKED
      )
      UPDATE scenario_jobs j SET status = 'queued', run_id = NULL, worker_id = NULL, stop_token = NULL
      FROM lost WHERE j.id = lost.id AND j.status = 'processing'`;
  }

  /** Which of the jobs are queued at this moment. */
  async queuedAmong(jobIds: string[]): Promise<Set<string>> {
    if (jobIds.length === 0) return new Set();
    const rows = await this.database.$queryRaw<{ id: string }[]>`
      SELECT j.id FROM unnest(${jobIds}::text[]) AS asked (id) JOIN scenario_jobs j ON j.id = asked.id
      WHERE j.status = 'queued'`;
    return new Set(rows.map(({ id }) => id));
  }

  /** Forgets workers that have given no sign of life for a day and owe no answer. */
  async forgetOldWorkers(): Promise<void> {
    await this.database.$executeRaw`
      DELETE FROM workers w WHERE w.seen_at < now() - interval '1 day' AND NOT EXISTS (
        SELECT FROM scenario_jobs j WHERE j.worker_id = w.id AND ${OWED})`;
  }
}
