import { type DynamicModule, Module } from '@nestjs/common';
import { ApiKeyGuard } from './auth/api-key.guard';
import { ApiKeyRepository } from './auth/api-key.repository';
import { type Settings } from './config/settings';
import { HealthController } from './http/health.controller';
import { MetricsController } from './http/metrics.controller';
import { InfrastructureModule } from './infrastructure/infrastructure.module';
import { type Logger } from './infrastructure/logger';
import { type Metrics } from './infrastructure/metrics';
import { CancelJob } from './modules/scenario-jobs/api/cancel-job';
import { CreateJob } from './modules/scenario-jobs/api/create-job';
import { JobGauges } from './modules/scenario-jobs/api/job-gauges';
import { JobsController } from './modules/scenario-jobs/api/jobs.controller';
import { JobQueue } from './modules/scenario-jobs/job-queue';
import { JobRepository } from './modules/scenario-jobs/job.repository';

/** The HTTP process: decides about jobs, runs none. */
@Module({})
export class ApiModule {
  static of(settings: Settings, logger: Logger, metrics: Metrics): DynamicModule {
    return {
      module: ApiModule,
      imports: [InfrastructureModule.of(settings, logger, metrics)],
      controllers: [JobsController, HealthController, MetricsController],
      providers: [ApiKeyGuard, ApiKeyRepository, JobRepository, JobQueue, CreateJob, CancelJob, JobGauges],
    };
  }
}
