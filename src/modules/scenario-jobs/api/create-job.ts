import { Inject, Injectable } from '@nestjs/common';
import { type Caller } from '../../../auth/caller';
import { LOGGER, type Logger } from '../../../infrastructure/logger';
import { JobQueue } from '../job-queue';
import { RowLocked, ScenarioNotFound } from '../job.errors';
import { JobRepository, type JobRow, type NewJob } from '../job.repository';
import { untilUnlocked } from './until-unlocked';
import { type CheckedBody } from './validate-create-job';

/**
 * Creates a job: the row first, then the queue entry. If Redis cannot take the entry, the job is accepted all the same,
 * and the reconciler adds the entry later.
 */
@Injectable()
export class CreateJob {
  constructor(
    private readonly jobs: JobRepository,
    private readonly queue: JobQueue,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {}

  /** `isNew` is false if the workspace already has a job with this `requestId`, which is then returned. */
  async create({ workspaceId }: Caller, body: CheckedBody): Promise<{ job: JobRow; isNew: boolean }> {
    const { requestId, fault } = body;
    const existing = requestId !== null && (await this.jobs.findByRequestId(workspaceId, requestId));
    if (existing) return { job: existing, isNew: false };
    if (fault) throw fault;
    const job = toNewJob(body);
    if (job.scenarioSlug !== null && !(await this.jobs.scenarioExists(workspaceId, job.scenarioSlug))) {
      throw new ScenarioNotFound(job.scenarioSlug);
    }
    const created = await untilUnlocked(() => this.jobs.create(workspaceId, job));
    if (!created) throw new RowLocked(`workspace ${workspaceId}`);
    if (created.isNew) await this.enqueue(created.job.id);
    return created;
  }

  private async enqueue(jobId: string): Promise<void> {
    try {
      await this.queue.add(jobId);
    } catch (error) {
      this.logger.warn({ err: error, jobId }, 'job could not be queued; the reconciler will queue it');
    }
  }
}

function toNewJob({ job, requestId }: CheckedBody): NewJob {
  return {
    userEmail: job.user_email,
    prompt: job.prompt,
    context: job.context ?? null,
    scenarioSlug: job.scenario_slug ?? null,
    requestId,
  };
}
