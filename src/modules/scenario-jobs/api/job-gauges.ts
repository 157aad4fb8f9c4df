import { Injectable, type OnModuleInit } from '@nestjs/common';
import { Metrics } from '../../../infrastructure/metrics';
import { JobRepository } from '../job.repository';

/** Lets the api's metrics show the jobs that are in the database. */
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
