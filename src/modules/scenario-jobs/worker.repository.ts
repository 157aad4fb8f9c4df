import { Injectable } from '@nestjs/common';
import { Prisma } from '../../generated/prisma/client';
import { Database } from '../../infrastructure/database';
import { OWED } from './job.sql';

/** A run for which a worker still owes an answer: its result, or the confirmation that its process is gone. */
export type OwedRun = {
  jobId: string;
  runId: string;
  status: 'processing' | 'cancelled';
  /** Seconds since the job was cancelled, by the clock of Postgres. */
  cancelledSeconds: number | null;
};

const OWED_RUN = Prisma.sql`j.id AS "jobId", j.run_id::text AS "runId", j.status::text AS status,
  EXTRACT(EPOCH FROM clock_timestamp() - j.completed_at)::float8 AS "cancelledSeconds"`;

/** A worker's signs of life, and the runs that it must still answer for. */
@Injectable()
export class WorkerRepository {
  constructor(private readonly database: Database) {}

  /** Every run for which the worker still owes an answer. */
  async findOwed(workerId: string): Promise<OwedRun[]> {
    return this.database.$queryRaw<OwedRun[]>`
      SELECT ${OWED_RUN} FROM scenario_jobs j WHERE j.worker_id = ${workerId} AND ${OWED}`;
  }

  /** Returns the same runs, and renews the worker's sign of life. */
  async reportAlive(workerId: string): Promise<OwedRun[]> {
    return this.database.$queryRaw<OwedRun[]>`
      WITH alive AS (
        INSERT INTO workers (id) VALUES (${workerId}) ON CONFLICT (id) DO UPDATE SET seen_at = now()
      )
      SELECT ${OWED_RUN} FROM scenario_jobs j WHERE j.worker_id = ${workerId} AND ${OWED}`;
  }

  /** Removes the sign of life: the worker ends and owes no more answers. */
  async reportGone(workerId: string): Promise<void> {
    await this.database.worker.deleteMany({ where: { id: workerId } });
  }
}
