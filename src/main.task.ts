/**
 * The process of one run. It loads one task module, runs it, reports and ends. It knows neither Postgres nor Redis, and
 * imports next to nothing, because it is started anew for each run.
 *
 * It sends `ready`; its worker answers with `start`, with `stop`, or with `start` and later `stop`. It sends
 * `acknowledged` when its event loop reads the stop, `progress` and `uncaught` meanwhile, and `returned`, `threw` or
 * `not loaded` at the end.
 */
import { access } from 'node:fs';
import { Socket } from 'node:net';
import { pathToFileURL } from 'node:url';
import { inspect } from 'node:util';
import { atMostEvery } from './modules/scenario-jobs/worker/at-most-every';
import { readLines } from './modules/scenario-jobs/worker/lines';
import {
  CHANNEL,
  type FromTask,
  isErrorCode,
  MAX_PROGRESS,
  MAX_RESULT,
  PROGRESS_EVERY_MS,
  shorten,
  shortenDetail,
  type StopReason,
  type TaskError,
  toLine,
  type ToTask,
} from './modules/scenario-jobs/worker/task-messages';

/** Codes of network errors, which may pass; the last four are those of Node's `fetch`. */
const TRANSIENT = new Set([
  'ECONNRESET',
  'ECONNREFUSED',
  'ETIMEDOUT',
  'EAI_AGAIN',
  'ENOTFOUND',
  'EPIPE',
  'EHOSTUNREACH',
  'ENETUNREACH',
  'UND_ERR_CONNECT_TIMEOUT',
  'UND_ERR_HEADERS_TIMEOUT',
  'UND_ERR_BODY_TIMEOUT',
  'UND_ERR_SOCKET',
]);
/** How many nested errors are examined. */
const MAX_CAUSES = 20;

type Threw = Extract<FromTask, { kind: 'threw' }>;

/** Saved before the task can replace them. */
const kill = process.kill.bind(process);
const nextTurn = setImmediate;
const stop = new AbortController();
const worker = new Socket({ fd: CHANNEL });
let started = false;
const progress = atMostEvery<string>(PROGRESS_EVERY_MS, (line) => worker.write(line));

// The result does not matter: this makes Node start its thread pool, so if the system has no threads left, the process
// ends here.
access('/', () => {
  send({ kind: 'ready' });
  readLines(worker, Infinity, (line) => {
    const message = JSON.parse(line) as ToTask;
    if (message.kind === 'start') {
      started = true;
      void run(message);
    } else {
      send({ kind: 'acknowledged' });
      abort(stop, message.reason);
      if (!started) finish(STOPPED);
    }
  });
  rehearseStop();
});
// The worker is gone, and with it anyone who could use a result. A task that never yields to the event loop does not
// get here: the watchdog ends it.
worker.on('close', () => process.exit(1));

// Node prints it as well, but that can be lost behind everything that the task has printed before.
process.on('uncaughtExceptionMonitor', (error) => send({ kind: 'uncaught', detail: detailOf(error) }));

function abort(controller: AbortController, reason: StopReason): void {
  controller.abort(new DOMException('The run is stopped', { name: 'AbortError', cause: reason }));
}

/** Aborts a signal while nobody waits for it: the first abort takes Node several times as long as any other. */
function rehearseStop(): void {
  const rehearsal = new AbortController();
  rehearsal.signal.addEventListener('abort', () => undefined);
  abort(rehearsal, 'cancelled');
}

async function run({ module, input }: Extract<ToTask, { kind: 'start' }>): Promise<void> {
  finish(await attempt(module, input));
}

async function attempt(path: string, input: Record<string, unknown>): Promise<FromTask> {
  if (await isStopped()) return STOPPED;
  let task: unknown;
  try {
    task = taskOf((await import(pathToFileURL(path).href)) as { default?: unknown });
  } catch (error) {
    return { kind: 'not loaded', detail: detailOf(error) };
  }
  if (typeof task !== 'function') {
    return { kind: 'not loaded', detail: `${path} has no default export that is a function` };
  }
  // The stop may have come while the module was loading.
  if (await isStopped()) return STOPPED;
  let result: unknown;
  try {
    result = await (task as (...args: unknown[]) => unknown)(input, {
      signal: stop.signal,
      progress: report,
    });
  } catch (error) {
    // What a stopped task throws changes nothing, but its clean-up may have failed.
    if (!stop.signal.aborted) return { kind: 'threw', error: errorOf(error), detail: detailOf(error) };
    return isStop(error) ? STOPPED : { ...STOPPED, detail: detailOf(error) };
  }
  return toMessage(result);
}

const STOPPED: Threw = { kind: 'threw', error: failure('TASK_STOPPED', 'The task was stopped') };

/** Whether the run was stopped before the task began, in which case the task never begins. */
async function isStopped(): Promise<boolean> {
  // The first await ends the current turn; a message that came while the event loop was busy is read in the next one.
  await endOfTurn();
  await endOfTurn();
  return stop.signal.aborted;
}

const endOfTurn = () => new Promise((resolve) => nextTurn(resolve));

/** The default export of an ES module, or what a CommonJS module exports, compiled from TypeScript or not. */
function taskOf(module: { default?: unknown }): unknown {
  const exported = module.default;
  return typeof exported === 'object' && exported !== null && 'default' in exported ? exported.default : exported;
}

function toMessage(result: unknown): FromTask {
  let json: string | undefined;
  try {
    json = JSON.stringify(result);
  } catch (error) {
    return {
      kind: 'threw',
      error: failure('RESULT_NOT_SERIALISABLE', 'The result of the task cannot be written as JSON'),
      detail: detailOf(error),
    };
  }
  if (json !== undefined && Buffer.byteLength(json) > MAX_RESULT) {
    return { kind: 'threw', error: failure('RESULT_TOO_LARGE', 'The result of the task is larger than 1 MiB') };
  }
  return { kind: 'returned', result: json };
}

/** What was thrown, for the log: an error with its stack and causes. */
const detailOf = (thrown: unknown) => read(() => shortenDetail(inspect(thrown)), 'a value that throws when it is read');

const errorOf = (thrown: unknown) => read(() => describe(thrown), describe(undefined));

/** Whether a task threw because it was stopped. What heeds a signal may throw an `AbortError` of its own. */
const isStop = (thrown: unknown) => read(() => (thrown as { name?: unknown } | null)?.name === 'AbortError', false);

/** What `from` reads of a thrown value, which may itself throw when it is read. */
function read<T>(from: () => T, otherwise: T): T {
  try {
    return from();
  } catch {
    return otherwise;
  }
}

/**
 * What the job's caller may know of an error. Only an error with `expose: true` shows its code and message; those of
 * any other are only logged, because they can name files, hosts or worse.
 */
function describe(thrown: unknown): TaskError {
  const error = (typeof thrown === 'object' && thrown !== null ? thrown : {}) as Record<string, unknown>;
  const { code, message, expose, retryable } = error;
  const exposed = expose === true && typeof message === 'string';
  return {
    code: exposed && isErrorCode(code) ? code : 'GENERATION_ERROR',
    message: exposed ? shorten(message) : 'Unable to generate scenario from the provided prompt',
    retryable: retryable === undefined ? mayPass(error) : retryable === true,
  };
}

/**
 * Whether an error may pass: a network error or a time-out. `fetch`, and whatever tries several addresses, wrap the
 * network error in one of their own.
 */
function mayPass(thrown: unknown): boolean {
  const found = [thrown];
  for (const error of found) {
    if (typeof error !== 'object' || error === null) continue;
    const { name, code, cause, errors } = error as Record<string, unknown>;
    // What `AbortSignal.timeout` aborts with.
    if (name === 'TimeoutError' || (typeof code === 'string' && TRANSIENT.has(code))) return true;
    const inner: unknown[] = [cause, ...(Array.isArray(errors) ? (errors as unknown[]).slice(0, MAX_CAUSES) : [])];
    found.push(...inner.slice(0, MAX_CAUSES - found.length));
  }
  return false;
}

function failure(code: string, message: string): TaskError {
  return { code, message, retryable: false };
}

function report(value: unknown): void {
  const line = progressLine(value);
  if (line === undefined)
    return console.error(`progress dropped: not JSON, or longer than about ${MAX_PROGRESS} characters`);
  progress.take(line);
}

function progressLine(progress: unknown): string | undefined {
  try {
    const line = toLine({ kind: 'progress', progress });
    return line.length <= MAX_PROGRESS ? line : undefined;
  } catch {
    return undefined;
  }
}

/** If the worker is gone, there is nobody to tell, and `close` ends the process. */
function send(message: FromTask): void {
  worker.write(toLine(message));
}

/** Sends the last message and ends once that and everything printed is out, whatever the task left running. */
function finish(message: FromTask): void {
  progress.flush();
  send(message);
  // Usually nothing is buffered: what a pipe has room for is written at once.
  const busy = [worker, process.stdout, process.stderr].filter((stream) => stream.writableLength > 0);
  const written = Promise.all(busy.map((stream) => new Promise((done) => stream.write('', done))));
  // Called outside the promise, so that an exception from an exit handler of the task also ends the process.
  void written.then(() => process.nextTick(end));
}

/**
 * Ends the process. If it was asked to stop, its process group is killed after the task's exit handlers, and with it
 * whatever the task has started. That skips Node's own teardown, a quarter of the time that the end would take; what
 * Node writes when it ends, such as a profile or coverage, is then not written.
 */
function end(): void {
  if (stop.signal.aborted) process.on('exit', () => kill(-process.pid, 'SIGKILL'));
  process.exit(0);
}
