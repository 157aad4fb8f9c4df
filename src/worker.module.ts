import { type DynamicModule, Module } from '@nestjs/common';
import { type Settings } from './config/settings';
import { HealthController } from './http/health.controller';
import { MetricsController } from './http/metrics.controller';
import { Database } from './infrastructure/database';
import { InfrastructureModule } from './infrastructure/infrastructure.module';
import { type Logger } from './infrastructure/logger';
import { type Metrics } from './infrastructure/metrics';
import { JobQueue } from './modules/scenario-jobs/job-queue';
import { RepairRepository } from './modules/scenario-jobs/repair.repository';
import { RunRepository } from './modules/scenario-jobs/run.repository';
import { ActiveRuns } from './modules/scenario-jobs/worker/active-runs';
import { CancelListener } from './modules/scenario-jobs/worker/cancel-listener';
import { QueueConsumer } from './modules/scenario-jobs/worker/queue-consumer';
import { Reconciler } from './modules/scenario-jobs/worker/reconciler';
import { RecordRun } from './modules/scenario-jobs/worker/record-run';
import { RunJob } from './modules/scenario-jobs/worker/run-job';
import { Watchdog } from './modules/scenario-jobs/worker/watchdog';
import { newWorkerId, WORKER_ID } from './modules/scenario-jobs/worker/worker-id';
import { WorkerLifecycle } from './modules/scenario-jobs/worker/worker-lifecycle';
import { WorkerRepository } from './modules/scenario-jobs/worker.repository';

const OWN_CONNECTION = Symbol('OWN_CONNECTION');

/** The process that runs jobs; its HTTP is for health and metrics only. */
@Module({})
export class WorkerModule {
  static of(settings: Settings, logger: Logger, metrics: Metrics): DynamicModule {
    return {
      module: WorkerModule,
      imports: [InfrastructureModule.of(settings, logger, metrics)],
      controllers: [HealthController, MetricsController],
      providers: [
        { provide: WORKER_ID, useFactory: newWorkerId },
        RunRepository,
        RepairRepository,
        JobQueue,
        // A connection of its own: no statement that waits for a row may keep the worker from polling for cancels.
        {
          provide: OWN_CONNECTION,
          useFactory: () => new Database({ ...settings, DATABASE_POOL_SIZE: 1 }, logger),
        },
        {
          provide: WorkerRepository,
          useFactory: (database: Database) => new WorkerRepository(database),
          inject: [OWN_CONNECTION],
        },
        ActiveRuns,
        Watchdog,
        RecordRun,
        RunJob,
        CancelListener,
        Reconciler,
        QueueConsumer,
        WorkerLifecycle,
      ],
    };
  }
}
