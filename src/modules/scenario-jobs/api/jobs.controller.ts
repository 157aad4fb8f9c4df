import { Body, Controller, Delete, Get, HttpStatus, Inject, Param, Post, Req, Res, UseGuards } from '@nestjs/common';
import {
  ApiBearerAuth,
  ApiBody,
  ApiExtraModels,
  ApiHeader,
  ApiOperation,
  ApiParam,
  ApiResponse,
  ApiTags,
} from '@nestjs/swagger';
import { type FastifyReply, type FastifyRequest } from 'fastify';
import { ApiKeyGuard, LooksUpKey } from '../../../auth/api-key.guard';
import { type Caller, CurrentCaller, CurrentKey, type PresentedKey } from '../../../auth/caller';
import { SETTINGS_TOKEN, type Settings } from '../../../config/settings';
import { ApiError } from '../../../http/api-error';
import { headerValues } from '../../../http/header-values';
import { errorResponse } from '../../../http/openapi-errors';
import { isId } from '../../../infrastructure/ids';
import { JobNotFound } from '../job.errors';
import { JobRepository, type JobRow } from '../job.repository';
import { CancelJob } from './cancel-job';
import { CreateJob } from './create-job';
import { CreateJobDto } from './create-job.dto';
import { CreatedScenarioJob, ScenarioJob, toScenarioJob } from './scenario-job.dto';
import { type CheckedBody, ValidateCreateJob } from './validate-create-job';

const IDEMPOTENCY_KEY = /^[\x20-\x7e]{1,255}$/;
const IDEMPOTENCY_RULE = 'Idempotency-Key must be 1 to 255 printable ASCII characters, sent once';

const CANCELLED_EXAMPLE = {
  id: 'j1o2b3i4d5x6',
  status: 'cancelled',
  scenario: null,
  error: null,
  created_at: '2024-03-01T10:00:00Z',
  started_at: '2024-03-01T10:00:05Z',
  completed_at: '2024-03-01T10:00:10Z',
  duration_seconds: 5,
};

@Controller('scenario-studio/jobs')
@UseGuards(ApiKeyGuard)
@ApiTags('Scenario Studio')
@ApiBearerAuth('bearerAuth')
@ApiExtraModels(ScenarioJob)
export class JobsController {
  constructor(
    private readonly jobs: JobRepository,
    private readonly createJob: CreateJob,
    private readonly cancelJob: CancelJob,
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
  ) {}

  @Post()
  @ApiOperation({
    operationId: 'createScenarioJob',
    summary: 'Create Scenario job',
    description:
      'Creates a job that makes a scenario out of a prompt. A job typically takes up to five minutes. ' +
      'A field that is not described here is refused.',
  })
  @ApiBody({ type: CreateJobDto })
  @ApiResponse({ status: 201, description: 'Job created', type: CreatedScenarioJob })
  @ApiResponse({ status: 200, description: 'The job that has this `request_id` already', type: CreatedScenarioJob })
  @ApiResponse(errorResponse('A field is missing or breaks its rule', 'missing_field', 'prompt is required'))
  @ApiResponse(errorResponse('Scenario to remix not found', 'scenario_not_found', 'Scenario not found: discovery-call'))
  async create(
    @CurrentCaller() caller: Caller,
    @Body(ValidateCreateJob) body: CheckedBody,
    @Req() request: FastifyRequest,
    @Res({ passthrough: true }) reply: FastifyReply,
  ): Promise<CreatedScenarioJob> {
    const { job, isNew } = await this.createJob.create(caller, body);
    request.logged = { jobId: job.id, outcome: isNew ? 'created' : 'existing' };
    reply.status(isNew ? HttpStatus.CREATED : HttpStatus.OK);
    return { ...this.show(job, caller), is_new: isNew };
  }

  @Get(':job_id')
  @LooksUpKey(true)
  @ApiOperation({ operationId: 'getScenarioJob', summary: 'Get Scenario job' })
  @ApiParam({ name: 'job_id', description: 'The job ID', schema: { type: 'string' } })
  @ApiResponse({ status: 200, description: 'The job', type: ScenarioJob })
  @ApiResponse(errorResponse('Job not found', 'job_not_found', 'Job not found: j1o2b3i4d5x6'))
  async get(
    @CurrentKey() key: PresentedKey,
    @Param('job_id') jobId: string,
    @Req() request: FastifyRequest,
  ): Promise<ScenarioJob> {
    request.logged = logged(jobId);
    const found = await this.jobs.find({ keyHash: key.hash, jobId });
    if (!found) {
      await key.identify();
      throw new JobNotFound(jobId);
    }
    key.recordCaller(found.caller);
    return this.show(found.job, found.caller);
  }

  @Delete(':job_id')
  @LooksUpKey(true)
  @ApiOperation({
    operationId: 'cancelScenarioJob',
    summary: 'Cancel Scenario job',
    description: [
      'Cancels a scenario creation job that is queued or processing.',
      '',
      '- **Queued jobs**: Marked as cancelled immediately',
      '- **Processing jobs**: The background task is terminated and the job is marked cancelled',
      '- **Completed/failed/cancelled jobs**: Returns 400 error (cannot cancel terminal states)',
      '',
    ].join('\n'),
  })
  @ApiParam({ name: 'job_id', description: 'The job ID to cancel', schema: { type: 'string' } })
  @ApiHeader({
    name: 'Idempotency-Key',
    required: false,
    description: 'Makes a retry safe: with the key of the request that cancelled the job, its 200 is answered again',
    schema: { type: 'string', pattern: IDEMPOTENCY_KEY.source },
  })
  @ApiResponse({
    status: 200,
    description: 'Job cancelled successfully',
    content: {
      'application/json': { schema: { $ref: '#/components/schemas/ScenarioJob' }, example: CANCELLED_EXAMPLE },
    },
  })
  @ApiResponse(
    errorResponse(
      'Job cannot be cancelled (already in terminal state)',
      'job_not_cancellable',
      "Cannot cancel job in 'completed' state",
    ),
  )
  @ApiResponse(errorResponse('Job not found', 'job_not_found', 'Job not found: j1o2b3i4d5x6'))
  async cancel(
    @CurrentKey() key: PresentedKey,
    @Param('job_id') jobId: string,
    @Req() request: FastifyRequest,
  ): Promise<ScenarioJob> {
    request.logged = logged(jobId);
    const idempotencyKeys = headerValues(request.raw, 'idempotency-key');
    if (!isIdempotencyKey(idempotencyKeys)) {
      await key.identify();
      throw new ApiError('invalid_idempotency_key', IDEMPOTENCY_RULE);
    }
    const { job, caller, outcome, from } = await this.cancelJob.cancel(key, jobId, idempotencyKeys[0] ?? null);
    request.logged = { jobId, outcome, from };
    return this.show(job, caller);
  }

  private show(job: JobRow, caller: Caller): ScenarioJob {
    return toScenarioJob(job, caller.workspaceSlug, this.settings.SCENARIO_DOMAIN);
  }
}

/** What to log of a job id from a request. Anything but an id is left out: a caller can send even a key there. */
function logged(jobId: string): { jobId?: string } {
  return isId(jobId) ? { jobId } : {};
}

function isIdempotencyKey(keys: string[]): boolean {
  return keys.length <= 1 && keys.every((key) => IDEMPOTENCY_KEY.test(key));
}
