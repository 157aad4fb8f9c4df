import { truncate, storable } from '../../../infrastructure/text';

/** The socket on which a worker and the process of a run exchange lines of JSON, in the process of the run. */
export const CHANNEL = 3;
/** A line longer than this is none of ours: no message is longer than the JSON of a result, which a message quotes. */
export const MAX_MESSAGE = 4 * 1024 * 1024;
/** A result is the description of a scenario, not a file: bytes of its JSON. */
export const MAX_RESULT = 1024 * 1024;
/** Progress is a word for people: characters of its message. */
export const MAX_PROGRESS = 4096;
/** More often than this nobody can read it: neither does a task send it more often, nor a worker log it. */
export const PROGRESS_EVERY_MS = 1000;
const MAX_ERROR_MESSAGE = 1000;
const ERROR_CODE = /^[A-Z][A-Z0-9_]{0,63}$/;

/**
 * Why a run is stopped; its task is told. `cancelled`: its job is. `superseded`: another run has taken over.
 * `interrupted`: this worker shuts down, or cannot ask Postgres any more. `timeout`: it takes too long.
 */
export type StopReason = 'cancelled' | 'superseded' | 'interrupted' | 'timeout';

/** What a worker tells the process of a run. */
export type ToTask =
  | { kind: 'start'; module: string; input: Record<string, unknown> }
  /** Please stop: aborts the task's signal. */
  | { kind: 'stop'; reason: StopReason };

/** What a task's error means for its job. `retryable`: the same run may succeed later. */
export type TaskError = { code: string; message: string; retryable: boolean };

/** What the process of a run tells its worker. */
export type FromTask =
  /** Its first word: it runs, and waits for `start`. */
  | { kind: 'ready' }
  /** The request to stop has reached the task: its event loop turns. */
  | { kind: 'acknowledged' }
  | { kind: 'progress'; progress: unknown }
  /** The task's result as JSON; undefined if it returned nothing that JSON can say. */
  | { kind: 'returned'; result: string | undefined }
  | { kind: 'threw'; error: TaskError };

export const toLine = (message: ToTask | FromTask) => `${JSON.stringify(message)}\n`;

/** The message in a line, if it is one of ours: a task has the same channel and may send anything. */
export function parseFromTask(line: string): FromTask | undefined {
  const { kind, progress, result, error } = parse(line);
  switch (kind) {
    case 'ready':
    case 'acknowledged':
      return line.length <= MAX_PROGRESS ? { kind } : undefined;
    case 'progress':
      return line.length <= MAX_PROGRESS ? { kind, progress } : undefined;
    case 'returned':
      if (result === undefined) return { kind, result };
      return typeof result === 'string' && Buffer.byteLength(result) <= MAX_RESULT ? { kind, result } : undefined;
    case 'threw':
      if (!isTaskError(error)) return undefined;
      // And nothing else that it may have: it is logged.
      return { kind, error: { code: error.code, message: storable(error.message), retryable: error.retryable } };
    default:
      return undefined;
  }
}

function parse(line: string): Record<string, unknown> {
  try {
    const message: unknown = JSON.parse(line);
    return typeof message === 'object' && message !== null ? (message as Record<string, unknown>) : {};
  } catch {
    return {};
  }
}

function isTaskError(error: unknown): error is TaskError {
  if (typeof error !== 'object' || error === null) return false;
  const { code, message, retryable } = error as Record<string, unknown>;
  return (
    isErrorCode(code) &&
    typeof message === 'string' &&
    message.length <= MAX_ERROR_MESSAGE &&
    typeof retryable === 'boolean'
  );
}

/** Whether an error may show its code to a job's caller. */
export function isErrorCode(code: unknown): code is string {
  return typeof code === 'string' && ERROR_CODE.test(code);
}

/** As much of an error's message as a job's caller gets. */
export function shorten(message: string): string {
  return truncate(message, MAX_ERROR_MESSAGE);
}

/** Set in the environment of a task and so of all that it starts: names the run, wherever they hide. */
export const RUN_ID_VARIABLE = 'SCENARIO_RUN_ID';
