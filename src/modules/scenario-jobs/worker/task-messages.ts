import { storable } from '../../../infrastructure/text';

/** What a worker tells the process of a run. */
export type ToTask =
  | { kind: 'start'; module: string; input: Record<string, unknown> }
  /** Please stop: aborts the task's signal. */
  | { kind: 'stop' };

/** What a task's error means for its job. `retryable`: the same run may succeed later. */
export type TaskError = { code: string; message: string; retryable: boolean };

/** What the process of a run tells its worker. */
export type FromTask =
  /** The request to stop has reached the task: its event loop turns. */
  | { kind: 'acknowledged' }
  | { kind: 'progress'; progress: unknown }
  /** The task's result as JSON; undefined if it returned nothing that JSON can say. */
  | { kind: 'returned'; result: string | undefined }
  | { kind: 'threw'; error: TaskError };

/** The message, if it is one of ours: a task has the same channel and may send anything. */
export function parseFromTask(message: unknown): FromTask | undefined {
  if (typeof message !== 'object' || message === null || !('kind' in message)) return undefined;
  const { kind, progress, result, error } = message as Record<string, unknown>;
  if (kind === 'acknowledged') return { kind };
  if (kind === 'progress') return { kind, progress };
  if (kind === 'returned') return result === undefined || typeof result === 'string' ? { kind, result } : undefined;
  if (kind !== 'threw' || !isTaskError(error)) return undefined;
  return { kind, error: { ...error, code: storable(error.code), message: storable(error.message) } };
}

function isTaskError(error: unknown): error is TaskError {
  if (typeof error !== 'object' || error === null) return false;
  const { code, message, retryable } = error as Record<string, unknown>;
  return typeof code === 'string' && typeof message === 'string' && typeof retryable === 'boolean';
}

/** Set in the environment of a task and so of all that it starts: names the run, wherever they hide. */
export const RUN_ID_VARIABLE = 'SCENARIO_RUN_ID';
