/**
 * The statuses that a job can go to from each status. Tests check the triggers in the database, and the README, against
 * it.
 */
export const TRANSITIONS = {
  queued: ['processing', 'cancelled'],
  // To itself: another worker takes over a job whose worker died.
  processing: ['processing', 'queued', 'completed', 'failed', 'cancelled'],
  completed: [],
  failed: [],
  cancelled: [],
} as const satisfies Record<string, readonly string[]>;

export type JobStatus = keyof typeof TRANSITIONS;

export const JOB_STATUSES = Object.keys(TRANSITIONS) as JobStatus[];

/** Whether a job in this status will never change again. */
export function isTerminal(status: JobStatus): boolean {
  return TRANSITIONS[status].length === 0;
}

/** Whether a job in this status can be cancelled. */
export function isCancellable(status: JobStatus): boolean {
  return (TRANSITIONS[status] as readonly JobStatus[]).includes('cancelled');
}

/** How the process of a cancelled run ended; see `stop` in worker/task-process.ts. */
export type StopKind = 'graceful' | 'terminated' | 'killed' | 'worker_lost';
