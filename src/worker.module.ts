import { type DynamicModule, Module } from '@nestjs/common';
import { type Settings } from './config/settings';
import { HealthController, PING_REDIS } from './http/health.controller';
import { MetricsController } from './http/metrics.controller';
import { Database } from './infrastructure/database';
import { InfrastructureModule } from './infrastructure/infrastructure.module';
import { type Logger } from './infrastructure/logger';
import { type Metrics } from './infrastructure/metrics';
import { JobQueue } from './modules/scenario-jobs/job-queue';
import { JobRepository } from './modules/scenario-jobs/job.repository';
import { ActiveRuns } from './modules/scenario-jobs/worker/active-runs';
import { CancelListener, JOBS_TO_ASK_ABOUT } from './modules/scenario-jobs/worker/cancel-listener';
import { QueueConsumer } from './modules/scenario-jobs/worker/queue-consumer';
import { Reconciler } from './modules/scenario-jobs/worker/reconciler';
import { RunJob } from './modules/scenario-jobs/worker/run-job';
import { Watchdog } from './modules/scenario-jobs/worker/watchdog';
import { newWorkerId, WORKER_ID } from './modules/scenario-jobs/worker/worker-id';
import { WorkerLifecycle } from './modules/scenario-jobs/worker/worker-lifecycle';

const ONE_CONNECTION = Symbol('ONE_CONNECTION');

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
        JobRepository,
        JobQueue,
        {
          provide: ONE_CONNECTION,
          useFactory: () => new Database({ ...settings, DATABASE_POOL_SIZE: 1 }, logger),
        },
        {
          provide: JOBS_TO_ASK_ABOUT,
          useFactory: (database: Database) => new JobRepository(database),
          inject: [ONE_CONNECTION],
        },
        ActiveRuns,
        Watchdog,
        RunJob,
        CancelListener,
        Reconciler,
        QueueConsumer,
        WorkerLifecycle,
        { provide: PING_REDIS, useFactory: (queue: JobQueue) => () => queue.ping(), inject: [JobQueue] },
      ],
    };
  }
}
