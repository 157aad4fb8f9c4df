import { ApiProperty, ApiPropertyOptional } from '@nestjs/swagger';
import { type JobRow } from '../job.repository';
import { JOB_STATUSES, type JobStatus } from '../job-status';

/** A job as the API shows it. */
export class ScenarioJob {
  @ApiPropertyOptional({ description: 'Job identifier' })
  id!: string;

  @ApiPropertyOptional({ type: String, enum: JOB_STATUSES, description: 'Current job status' })
  status!: JobStatus;

  @ApiPropertyOptional({
    type: 'object',
    nullable: true,
    description: 'Created scenario details (only present when status is "completed")',
    properties: {
      id: { type: 'string', description: 'Scenario ID' },
      name: { type: 'string', description: 'Scenario name' },
      url: { type: 'string', format: 'uri', description: 'Direct link to the scenario' },
    },
  })
  scenario!: { id: string; name: string; url: string } | null;

  @ApiPropertyOptional({
    type: 'object',
    nullable: true,
    description: 'Error details (only present when status is "failed")',
    properties: {
      code: { type: 'string', description: 'Error code (e.g. GENERATION_ERROR, CONTENT_POLICY_VIOLATION)' },
      message: { type: 'string', description: 'Human-readable error message' },
    },
  })
  error!: { code: string; message: string } | null;

  @ApiPropertyOptional({ type: String, format: 'date-time', description: 'When the job was created' })
  created_at!: string;

  @ApiPropertyOptional({
    type: String,
    format: 'date-time',
    nullable: true,
    description: 'When the job started processing',
  })
  started_at!: string | null;

  @ApiPropertyOptional({
    type: String,
    format: 'date-time',
    nullable: true,
    description: 'When the job finished (success, failure, or cancelled)',
  })
  completed_at!: string | null;

  @ApiPropertyOptional({
    type: Number,
    nullable: true,
    description: 'Processing duration in seconds (only present when job has completed)',
  })
  duration_seconds!: number | null;
}

export class CreatedScenarioJob extends ScenarioJob {
  @ApiProperty({ description: 'False when the workspace already had a job with this `request_id`' })
  is_new!: boolean;
}

/**
 * Formats a row for the API. Times are UTC, ISO 8601 with milliseconds and `Z`; the duration is in seconds and exactly
 * `completed_at - started_at`.
 */
export function toScenarioJob(row: JobRow, workspaceSlug: string, domain: string): ScenarioJob {
  const { scenarioId: id, scenarioName: name, scenarioSlug: slug, errorCode: code, errorMessage: message } = row;
  return {
    id: row.id,
    status: row.status,
    scenario:
      id !== null && name !== null && slug !== null
        ? { id, name, url: `https://${workspaceSlug}.${domain}/scenarios/${slug}` }
        : null,
    error: code !== null && message !== null ? { code, message } : null,
    created_at: row.createdAt.toISOString(),
    started_at: row.startedAt?.toISOString() ?? null,
    completed_at: row.completedAt?.toISOString() ?? null,
    duration_seconds:
      row.startedAt && row.completedAt ? (row.completedAt.getTime() - row.startedAt.getTime()) / 1000 : null,
  };
}
