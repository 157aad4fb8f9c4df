/**
 * The process of one run. It loads one task module, runs it, reports and ends. It knows neither Postgres nor
 * Redis, and imports next to nothing, for it is started anew for each run.
 *
 * It sends `ready`; its worker answers with `start`, with `stop`, or with `start` and later `stop`; it sends
 * `acknowledged` when its event loop comes round to the stop, `progress`, and at the end `returned` or `threw`.
 */
import { access } from 'node:fs';
import { Socket } from 'node:net';
import { pathToFileURL } from 'node:url';
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
  type StopReason,
  type TaskError,
  toLine,
  type ToTask,
} from './modules/scenario-jobs/worker/task-messages';

/** Codes of errors of the network, which may pass; the last ones are those of Node's fetch. */
const TRANSIENT = new Set([
  'ECONNRESET',
  'ECONNREFUSED',
  'ETIMEDOUT',
  'EAI_AGAIN',
  'EPIPE',
  'EHOSTUNREACH',
  'ENETUNREACH',
  'UND_ERR_CONNECT_TIMEOUT',
  'UND_ERR_HEADERS_TIMEOUT',
  'UND_ERR_BODY_TIMEOUT',
  'UND_ERR_SOCKET',
]);
/** Errors within an error that are looked at. */
const MAX_CAUSES = 20;

/** Kept before the task can replace them. */
const kill = process.kill.bind(process);
const nextTurn = setImmediate;
const stop = new AbortController();
const worker = new Socket({ fd: CHANNEL });
let started = false;
const progress = atMostEvery<string>(PROGRESS_EVERY_MS, (line) => worker.write(line));

// Whatever it finds: Node starts its pool of threads for it, and ends here where the system has none left.
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
// The worker is gone, and with it whoever could use a result. A loop that never yields does not get here: the
// watchdog ends it.
worker.on('close', () => process.exit(1));

function abort(controller: AbortController, reason: StopReason): void {
  controller.abort(new DOMException('The run is stopped', { name: 'AbortError', cause: reason }));
}

/** While nobody waits for it: the first signal that is aborted takes Node several times as long as any other. */
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
    console.error(error);
    return { kind: 'threw', error: failure('TASK_NOT_LOADED', 'The task could not be loaded') };
  }
  if (typeof task !== 'function') {
    console.error(`${path} has no default export that is a function`);
    return { kind: 'threw', error: failure('TASK_NOT_LOADED', 'The task could not be loaded') };
  }
  // While its module was loading.
  if (await isStopped()) return STOPPED;
  let result: unknown;
  try {
    result = await (task as (...args: unknown[]) => unknown)(input, {
      signal: stop.signal,
      progress: report,
    });
  } catch (error) {
    // Whatever it throws once it is stopped: nobody asks for it.
    return stop.signal.aborted ? STOPPED : { kind: 'threw', error: logAndDescribe(error) };
  }
  return toMessage(result);
}

const STOPPED: FromTask = { kind: 'threw', error: failure('TASK_STOPPED', 'The task was stopped') };

/** Whether it is asked to stop before it begins: then it does not. */
async function isStopped(): Promise<boolean> {
  // A message that came while the event loop was busy is read in the next turn; the first of these ends this one.
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
    console.error(error);
    return {
      kind: 'threw',
      error: failure('RESULT_NOT_SERIALISABLE', 'The result of the task cannot be written as JSON'),
    };
  }
  if (json !== undefined && Buffer.byteLength(json) > MAX_RESULT) {
    return { kind: 'threw', error: failure('RESULT_TOO_LARGE', 'The result of the task is larger than 1 MiB') };
  }
  return { kind: 'returned', result: json };
}

function logAndDescribe(thrown: unknown): TaskError {
  try {
    console.error(thrown);
    return describe(thrown);
  } catch {
    return describe(undefined); // What was thrown throws when it is looked at.
  }
}

/**
 * What the job's caller may know of an error. Only one that says `expose: true` shows its code and message; of
 * any other they stay in the log, for they can name files, hosts or worse.
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

/** `fetch`, and whatever tries several addresses, put the error of the network inside one of their own. */
function mayPass(thrown: unknown): boolean {
  const found = [thrown];
  for (const error of found) {
    if (typeof error !== 'object' || error === null) continue;
    const { code, cause, errors } = error as Record<string, unknown>;
    if (typeof code === 'string' && TRANSIENT.has(code)) return true;
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
  if (line === undefined) return console.error(`progress dropped: it is no JSON of about ${MAX_PROGRESS} characters`);
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

/** Without a worker there is nobody to tell; `close` ends the process. */
function send(message: FromTask): void {
  worker.write(toLine(message));
}

/** Sends the last message and ends when it and all that was printed is out, whatever the task left running. */
function finish(message: FromTask): void {
  progress.flush();
  send(message);
  // Mostly nothing waits: what a pipe has room for is written at once.
  const busy = [worker, process.stdout, process.stderr].filter((stream) => stream.writableLength > 0);
  const written = Promise.all(busy.map((stream) => new Promise((done) => stream.write('', done))));
  // Outside of the promise: what an exit handler of the task throws then ends the process as well.
  void written.then(() => process.nextTick(end));
}

/**
 * Once it was asked to stop, the process is not taken apart by Node, a quarter of the time that its end would take:
 * after the exit handlers of the task its group is killed, and with it whatever the task has started. What Node writes
 * when it ends, a profile or a coverage, is not written then.
 */
function end(): void {
  if (stop.signal.aborted) process.on('exit', () => kill(-process.pid, 'SIGKILL'));
  process.exit(0);
}
