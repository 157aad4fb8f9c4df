import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { type Readable } from 'node:stream';
import { within } from '../../../infrastructure/within';
import { type StopKind } from '../job-status';
import { killTrees, type ProcessTree, signalGroup } from './process-tree';
import { parseFromTask, RUN_ID_VARIABLE, type TaskError, type ToTask } from './task-messages';

/** A task inherits these of the worker's environment and those that the settings name: no credentials. */
const INHERITED = [
  'PATH',
  'HOME',
  'LANG',
  'LC_ALL',
  'TZ',
  'TMPDIR',
  'NODE_ENV',
  'NODE_EXTRA_CA_CERTS',
  'SCENARIO_TASK_STEP_MS',
];
/** A task that has reported has nothing left to do but to exit. */
const EXIT_WITHIN_MS = 1000;
/** When the whole tree is dead its output ends at once. */
const OUTPUT_WITHIN_MS = 200;
const MAX_LINE = 4096;
/** What one run may print into the log. */
const MAX_OUTPUT = 64 * 1024;
/** Whoever sent them: the watchdog may have. */
const ENDED_BY: Record<string, StopKind> = { SIGTERM: 'terminated', SIGKILL: 'killed' };
const OUT_OF_MEMORY = /JavaScript heap out of memory|Allocation failed/;

export type TaskOptions = {
  runId: string;
  memoryMb: number;
  /** Names of further variables to inherit. */
  inherit: readonly string[];
  stop: { ackMs: number; graceMs: number; killMs: number };
  onProgress: (progress: unknown) => void;
  /** A line that the task printed. */
  onOutput: (line: string, stream: 'stdout' | 'stderr') => void;
};

/** How a run's process ended, if nobody stopped it before it could. */
export type TaskEnd =
  | { kind: 'returned'; result: string | undefined }
  | { kind: 'threw'; error: TaskError }
  /** The system had no process for it. */
  | { kind: 'not started' }
  /** It ended without a word. */
  | { kind: 'exited'; code: number | null; signal: NodeJS.Signals | null; outOfMemory: boolean };

type Exit = { code: number | null; signal: NodeJS.Signals | null };

/**
 * One run of a task: a process of its own that leads a process group of its own, and waits to be told what to do.
 * When `ended` resolves, no process of the tree lives any more.
 */
export class TaskProcess {
  readonly tree: ProcessTree;
  /** How the task ended, and how its process did: by itself, or by which signal. */
  readonly ended: Promise<{ end: TaskEnd; how: StopKind }>;
  private readonly child: ChildProcess;
  private end: TaskEnd | undefined;
  private how: StopKind = 'graceful';
  private stopping = false;
  private acknowledged = false;
  private outOfMemory = false;
  private timer: NodeJS.Timeout | undefined;

  constructor(private readonly options: TaskOptions) {
    const { runId, inherit } = options;
    this.child = fork(join(__dirname, '../../../main.task.js'), [], {
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
      env: environment(runId, inherit),
      execArgv: ['--enable-source-maps', `--max-old-space-size=${options.memoryMb}`],
    });
    this.tree = { groupId: this.child.pid ?? 0, runId };
    this.child.on('message', (message) => this.onMessage(message));
    // A process that could not be started, or a message to one that has just ended: `exit` tells the rest.
    this.child.on('error', (error) => options.onOutput(String(error), 'stderr'));
    this.watchOutput();
    this.ended = this.untilGone();
  }

  /** Has it load the task module at this path, and call it. */
  start(module: string, input: Record<string, unknown>): void {
    this.send({ kind: 'start', module, input });
  }

  /**
   * Ends the task, on whatever it is. Asks it first. If it acknowledges, it has the grace to clean up; if it
   * does not, it computes without yielding and no grace would help. Then SIGTERM, then SIGKILL, each to the
   * whole group. Calling it twice is calling it once.
   */
  stop(): void {
    if (this.stopping) return;
    this.stopping = true;
    clearTimeout(this.timer);
    this.send({ kind: 'stop' });
    this.timer = setTimeout(() => {
      if (!this.acknowledged) this.terminate();
    }, this.options.stop.ackMs);
  }

  private terminate(): void {
    this.how = 'terminated';
    this.signal('SIGTERM');
    this.timer = setTimeout(() => {
      this.how = 'killed';
      this.signal('SIGKILL');
    }, this.options.stop.killMs);
  }

  /** Not once the process has been reaped: its group's id may be somebody else's by now. */
  private signal(signal: NodeJS.Signals): void {
    if (this.child.exitCode === null && this.child.signalCode === null) signalGroup(this.tree.groupId, signal);
  }

  private onMessage(sent: unknown): void {
    const message = parseFromTask(sent);
    switch (message?.kind) {
      case 'progress':
        if (!this.stopping) this.options.onProgress(message.progress);
        return;
      case 'acknowledged':
        if (!this.stopping || this.acknowledged || this.how !== 'graceful') return;
        this.acknowledged = true;
        clearTimeout(this.timer);
        this.timer = setTimeout(() => this.terminate(), this.options.stop.graceMs);
        return;
      case 'returned':
      case 'threw':
        if (this.end) return;
        this.end = message;
        if (!this.stopping) this.timer = setTimeout(() => this.signal('SIGKILL'), EXIT_WITHIN_MS);
        return;
      case undefined: // Not one of ours.
    }
  }

  private async untilGone(): Promise<{ end: TaskEnd; how: StopKind }> {
    const exit = await new Promise<Exit | undefined>((resolve) => {
      this.child.once('exit', (code, signal) => resolve({ code, signal }));
      if (this.child.pid === undefined) this.child.once('error', () => resolve(undefined));
    });
    clearTimeout(this.timer);
    if (!exit) return { end: { kind: 'not started' }, how: this.how };
    await killTrees([this.tree]);
    await this.untilOutputIsRead();
    const end = this.end ?? { kind: 'exited', ...exit, outOfMemory: this.outOfMemory };
    return { end, how: ENDED_BY[exit.signal ?? ''] ?? this.how };
  }

  /** Nothing that writes is left, unless it hides well: for that nobody waits. */
  private async untilOutputIsRead(): Promise<void> {
    const { stdout, stderr } = this.child;
    const open = [stdout, stderr].filter((stream) => stream !== null && !stream.closed);
    await within(
      OUTPUT_WITHIN_MS,
      'output',
      Promise.all(open.map((stream) => once(stream as Readable, 'close'))),
    ).catch(() => undefined);
    stdout?.destroy();
    stderr?.destroy();
  }

  private watchOutput(): void {
    let budget = MAX_OUTPUT;
    for (const stream of ['stdout', 'stderr'] as const) {
      const source = this.child[stream];
      if (!source) continue;
      readLines(source, (line) => {
        if (stream === 'stderr' && OUT_OF_MEMORY.test(line)) this.outOfMemory = true;
        if (budget <= 0) return;
        budget -= line.length + 1;
        this.options.onOutput(line, stream);
        if (budget <= 0)
          this.options.onOutput(`… the task has printed ${MAX_OUTPUT / 1024} KiB, the rest is dropped`, stream);
      });
    }
  }

  private send(message: ToTask): void {
    if (this.child.connected) this.child.send(message, () => undefined);
  }
}

function environment(runId: string, inherit: readonly string[]): NodeJS.ProcessEnv {
  const names = [...INHERITED, ...inherit].filter((name) => process.env[name] !== undefined);
  return { ...Object.fromEntries(names.map((name) => [name, process.env[name]])), [RUN_ID_VARIABLE]: runId };
}

/** Calls back for each line, cut to `MAX_LINE`. Never holds more than a line, and never stops reading. */
function readLines(source: Readable, onLine: (line: string) => void): void {
  let rest = '';
  source.setEncoding('utf8');
  source.on('data', (chunk: string) => {
    const lines = (rest + chunk).split('\n');
    rest = (lines.pop() ?? '').slice(0, MAX_LINE);
    for (const line of lines) if (line !== '') onLine(line.slice(0, MAX_LINE));
  });
  source.on('close', () => {
    if (rest !== '') onLine(rest);
  });
  source.on('error', () => undefined);
}
