import { type JobStatus } from './job-status';

/** There is no such job in the caller's workspace. */
export class JobNotFound extends Error {
  constructor(readonly jobId: string) {
    super(`Job not found: ${jobId}`);
  }
}

/** The job has reached a terminal status and cannot be cancelled any more. */
export class JobNotCancellable extends Error {
  constructor(
    readonly jobId: string,
    readonly status: JobStatus,
  ) {
    super(`Cannot cancel job in '${status}' state`);
  }
}

/** A row that the request needs stays locked by somebody else. */
export class RowLocked extends Error {
  constructor(whose: string) {
    super(`The row of ${whose} is locked`);
  }
}

/** There is no scenario of this slug in the caller's workspace. */
export class ScenarioNotFound extends Error {
  constructor(readonly slug: string) {
    super(`Scenario not found: ${slug}`);
  }
}
