import { Injectable, type OnModuleInit } from '@nestjs/common';
import { Metrics } from '../../../infrastructure/metrics';
import { JobRepository } from '../job.repository';

/** Adds the numbers of jobs in the database to the api's metrics. */
@Injectable()
export class JobGauges implements OnModuleInit {
  constructor(
    private readonly jobs: JobRepository,
    private readonly metrics: Metrics,
  ) {}

  onModuleInit(): void {
    this.metrics.showJobs(() => this.jobs.countUnfinished());
  }
}
