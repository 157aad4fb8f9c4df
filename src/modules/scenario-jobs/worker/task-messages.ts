import { truncate, storable } from '../../../infrastructure/text';

/** The file descriptor, in the process of a run, of the socket on which it and its worker exchange lines of JSON. */
export const CHANNEL = 3;
/** A longer line is not one of ours: the longest message is a result, whose JSON the message quotes. */
export const MAX_MESSAGE = 4 * 1024 * 1024;
/** Limit of a result, in bytes of its JSON: a result describes a scenario, and is not a file. */
export const MAX_RESULT = 1024 * 1024;
/** Limit of progress, in characters of its message: progress is meant for people to read. */
export const MAX_PROGRESS = 4096;
/** How often a task sends progress, and a worker logs it, at most: nobody can read it more often. */
export const PROGRESS_EVERY_MS = 1000;
/** Limit of what is logged of an error, in characters: a message, a stack and some causes. */
const MAX_DETAIL = 16_384;
const MAX_ERROR_MESSAGE = 1000;
const ERROR_CODE = /^[A-Z][A-Z0-9_]{0,63}$/;

/**
 * Why a run is stopped, as its task is told. `cancelled`: the job was cancelled. `superseded`: another run has taken
 * over. `interrupted`: this worker shuts down, or can no longer ask Postgres. `timeout`: the run takes too long.
 */
export type StopReason = 'cancelled' | 'superseded' | 'interrupted' | 'timeout';

/** What a worker tells the process of a run. */
export type ToTask =
  | { kind: 'start'; module: string; input: Record<string, unknown> }
  /** Asks the task to stop: aborts its signal. */
  | { kind: 'stop'; reason: StopReason };

/** What a task's error means for its job. `retryable`: the same run may succeed later. */
export type TaskError = { code: string; message: string; retryable: boolean };

/** What the process of a run tells its worker. */
export type FromTask =
  /** The first message: the process runs, and waits for `start`. */
  | { kind: 'ready' }
  /** The request to stop has reached the task, so its event loop turns. */
  | { kind: 'acknowledged' }
  | { kind: 'progress'; progress: unknown }
  /** The task's result as JSON; undefined if it returned nothing that JSON can express. */
  | { kind: 'returned'; result: string | undefined }
  /** `detail`, here and below: what was thrown, with its stack, for the log alone. */
  | { kind: 'threw'; error: TaskError; detail?: string }
  /** There is no task to run: its module cannot be loaded, or exports none. */
  | { kind: 'not loaded'; detail: string }
  /** Something that nothing has caught, which usually ends the process. */
  | { kind: 'uncaught'; detail: string };

export const toLine = (message: ToTask | FromTask) => `${JSON.stringify(message)}\n`;

/** The message in a line, if it is one of ours: a task has access to the channel and may send anything. */
export function parseFromTask(line: string): FromTask | undefined {
  const { kind, progress, result, error, detail } = parse(line);
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
      return {
        kind,
        // Nothing else that the error may contain, because this is logged.
        error: { code: error.code, message: storable(error.message), retryable: error.retryable },
        ...(typeof detail === 'string' && { detail: shortenDetail(detail) }),
      };
    case 'not loaded':
    case 'uncaught':
      return typeof detail === 'string' ? { kind, detail: shortenDetail(detail) } : undefined;
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

/** The part of what was thrown that is logged. */
export function shortenDetail(detail: string): string {
  return truncate(detail, MAX_DETAIL);
}

/** The part of an error's message that a job's caller gets. */
export function shorten(message: string): string {
  return truncate(message, MAX_ERROR_MESSAGE);
}
