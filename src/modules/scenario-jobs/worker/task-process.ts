import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { type Duplex } from 'node:stream';
import { within } from '../../../infrastructure/within';
import { type StopKind } from '../job-status';
import { readLines } from './lines';
import { isInGroup, killTrees, type ProcessTree, signalGroup } from './process-tree';
import {
  MAX_MESSAGE,
  parseFromTask,
  PROGRESS_EVERY_MS,
  RUN_ID_VARIABLE,
  type StopReason,
  type TaskError,
  toLine,
  type ToTask,
} from './task-messages';
import { type OnOutput, type TaskOutput, watchOutput } from './task-output';

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
/**
 * A process that has not said by then that it runs never will: Node can hang at its start when the system has no
 * threads for it.
 */
const READY_WITHIN_MS = 60_000;
/** A task that has reported has nothing left to do but to end. */
const EXIT_WITHIN_MS = 1000;
/** How soon the system tells the end of a process that is dead. */
const END_SEEN_WITHIN_MS = 1000;
/** When the whole tree is dead all that it has said can be read at once. */
const READ_WITHIN_MS = 200;
/**
 * So many characters of what is no message are read of one run, a line for at least so many: reading it keeps others
 * waiting.
 */
const MAX_STRANGE = 4 * MAX_MESSAGE;
const STRANGE_LINE = MAX_STRANGE / 100;
/** Messages beyond so many, and twice as many more as a task sends in that time, are strange as well. */
const MANY_MESSAGES = 100;
/** Whether we sent the signal or the watchdog did. */
const ENDED_BY: Record<string, StopKind> = { SIGTERM: 'terminated', SIGKILL: 'killed' };
/** How V8 ends a process that is out of memory; one that only prints such words ends otherwise. */
const ABORTED = new Set<string | number | null>(['SIGABRT', 'SIGTRAP', 134, 133]);

type TaskOptions = {
  runId: string;
  memoryMb: number;
  /** Names of further variables to inherit. */
  inherit: readonly string[];
  stop: { ackMs: number; graceMs: number; killMs: number };
  onProgress: (progress: unknown) => void;
  onOutput: OnOutput;
  /** Processes of the tree that live on although they were killed. */
  onSurvivors: (pids: number[]) => void;
};

/** How a run's process ended, if nobody stopped it before it could. */
export type TaskEnd =
  | { kind: 'returned'; result: string | undefined }
  | { kind: 'threw'; error: TaskError }
  /** The system had no process for it, or not what Node needs to start. */
  | { kind: 'not started' }
  /** It ended without a word. */
  | { kind: 'exited'; code: number | null; signal: NodeJS.Signals | null; outOfMemory: boolean };

type Exit = { code: number | null; signal: NodeJS.Signals | null };
/** Its first process, too, can be one that cannot be killed. */
type Unkillable = { survivors: number[] };

/**
 * One run of a task: a process of its own that leads a process group of its own, and waits to be told what to do.
 * When `ended` resolves, no process of the tree lives any more, unless it cannot be killed: for that there is `gone`.
 */
export class TaskProcess {
  readonly tree: ProcessTree;
  /** Resolves when it waits to be told what to do. */
  readonly ready: Promise<void>;
  /** How the task ended, and how its process did: by itself, or by which signal. */
  readonly ended: Promise<{ end: TaskEnd; how: StopKind }>;
  private readonly child: ChildProcess;
  private readonly channel: Duplex | null;
  private readonly output: TaskOutput;
  private end: TaskEnd | undefined;
  private how: StopKind = 'graceful';
  private readonly began = performance.now();
  private isReady = false;
  private stopping = false;
  private acknowledged = false;
  private heard = 0;
  private strange = 0;
  private survivors: number[] = [];
  private timer: NodeJS.Timeout | undefined;
  private sayReady: () => void = () => undefined;
  private giveUp: (unkillable: Unkillable) => void = () => undefined;

  constructor(private readonly options: TaskOptions) {
    const { runId, inherit } = options;
    const flags = ['--enable-source-maps', `--max-old-space-size=${options.memoryMb}`];
    // Not Node's own channel between processes: what a task writes there can end the worker.
    this.child = spawn(process.execPath, [...flags, join(__dirname, '../../../main.task.js')], {
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe', 'pipe'],
      env: environment(runId, inherit),
    });
    // A process that could not be started: `ended` tells the rest. Without file descriptors it has no stdio either.
    this.child.on('error', (error) => options.onOutput(String(error), 'stderr'));
    const stdio = this.child.stdio as ChildProcess['stdio'] | undefined;
    this.channel = (stdio?.[3] as Duplex | null | undefined) ?? null;
    this.tree = { groupId: this.child.pid ?? 0, runId };
    if (this.channel) readLines(this.channel, MAX_MESSAGE, (line) => this.onMessage(line));
    this.output = watchOutput(this.child, options.onOutput);
    this.ready = new Promise((resolve) => (this.sayReady = resolve));
    this.ended = this.untilEnded();
    this.after(READY_WITHIN_MS, () => this.kill());
  }

  /** Has it load the task module at this path, and call it. Does nothing when it has been told to stop. */
  start(module: string, input: Record<string, unknown>): void {
    if (!this.stopping) this.send({ kind: 'start', module, input });
  }

  /**
   * Ends the task, on whatever it is. Asks it first. If it acknowledges, it has the grace to clean up; if it
   * does not, it computes without yielding and no grace would help. Then SIGTERM, then SIGKILL, each to the
   * whole group. Calling it twice is calling it once.
   */
  stop(reason: StopReason): void {
    if (this.stopping) return;
    this.stopping = true;
    this.send({ kind: 'stop', reason });
    this.after(this.options.stop.ackMs, () => this.terminate());
  }

  /** Resolves when nothing of the tree lives: perhaps long after `ended`, or never. */
  async gone(): Promise<void> {
    await this.ended;
    while (this.survivors.length > 0) {
      // The number of a group of which nothing lives may be somebody else's by now.
      const groupId = (await isInGroup(this.survivors, this.tree.groupId)) ? this.tree.groupId : 0;
      this.survivors = await killTrees([{ ...this.tree, groupId }]);
    }
  }

  /** Whether the task has returned or thrown. */
  get hasEnded(): boolean {
    return this.end !== undefined;
  }

  /**
   * Instead of what was to be done before. When the time is over, what the process has said meanwhile is read first:
   * a worker that was kept from running would find every timer run out before it finds a word in a channel.
   */
  private after(milliseconds: number, act: () => void): void {
    clearTimeout(this.timer);
    const timer = setTimeout(() => setImmediate(() => this.timer === timer && act()), milliseconds);
    this.timer = timer;
  }

  /** Nothing is done any more when a time is over, nor what was to be done in this very turn. */
  private expectNothing(): void {
    clearTimeout(this.timer);
    this.timer = undefined;
  }

  private terminate(): void {
    this.signal('SIGTERM', 'terminated');
    this.after(this.options.stop.killMs, () => this.kill());
  }

  private kill(): void {
    if (!this.signal('SIGKILL', 'killed')) return;
    // What has left the group too, not only when the task is gone: something that traces it can keep it from that.
    killTrees([this.tree]).then(
      // The end of one that is dead is not waited for without a limit, either: a debugger can keep it to itself.
      (survivors) => void setTimeout(() => this.giveUp({ survivors }), survivors.length > 0 ? 0 : END_SEEN_WITHIN_MS),
      () => undefined,
    );
  }

  /** Not once the process has been reaped, which it says: its group's id may be somebody else's by now. */
  private signal(signal: NodeJS.Signals, how: StopKind): boolean {
    if (this.child.exitCode !== null || this.child.signalCode !== null) return false;
    this.how = how;
    signalGroup(this.tree.groupId, signal);
    return true;
  }

  /** False when nothing more is heard. */
  private onMessage(line: string): void | false {
    if (this.end) return false;
    const message = this.isTooMuch() ? undefined : parseFromTask(line);
    switch (message?.kind) {
      case 'ready':
        if (!this.stopping && !this.isReady) this.expectNothing();
        this.isReady = true;
        this.sayReady();
        return;
      case 'progress':
        if (!this.stopping) this.options.onProgress(message.progress);
        return;
      case 'acknowledged':
        if (!this.stopping || this.acknowledged || this.how !== 'graceful') return;
        this.acknowledged = true;
        this.after(this.options.stop.graceMs, () => this.terminate());
        return;
      case 'returned':
      case 'threw':
        this.end = message;
        if (!this.stopping) this.after(EXIT_WITHIN_MS, () => this.kill());
        return false;
      case undefined: // Not one of ours.
        this.strange += Math.max(line.length, STRANGE_LINE);
        if (this.strange <= MAX_STRANGE) return;
        this.options.onOutput('… the task has sent too much that is no message, and is heard no more', 'stderr');
        return false;
    }
  }

  /** Whether it has sent more messages than a task has to: reading them keeps others waiting, too. */
  private isTooMuch(): boolean {
    const due = (2 * (performance.now() - this.began)) / PROGRESS_EVERY_MS;
    return ++this.heard > MANY_MESSAGES + due;
  }

  private async untilEnded(): Promise<{ end: TaskEnd; how: StopKind }> {
    const exit = await new Promise<Exit | Unkillable | undefined>((resolve) => {
      this.giveUp = resolve;
      this.child.once('exit', (code, signal) => resolve({ code, signal }));
      if (this.child.pid === undefined) this.child.once('error', () => resolve(undefined));
    });
    this.expectNothing();
    if (!exit) return { end: { kind: 'not started' }, how: this.how };
    this.survivors = 'survivors' in exit ? exit.survivors : await killTrees([this.tree]);
    if (this.survivors.length > 0) this.options.onSurvivors(this.survivors);
    await this.untilAllIsRead();
    // Asked to stop, it kills itself after its last word: no SIGKILL of ours, and so `graceful`.
    if (this.end) return { end: this.end, how: this.how };
    const { code, signal } = 'survivors' in exit ? { code: null, signal: null } : exit;
    const how = ENDED_BY[signal ?? ''] ?? this.how;
    if (!this.isReady) return { end: { kind: 'not started' }, how };
    const outOfMemory = this.output.saysOutOfMemory && ABORTED.has(signal ?? code);
    return { end: { kind: 'exited', code, signal, outOfMemory }, how };
  }

  /** Nothing that writes is left, unless it hides well: for that nobody waits. */
  private async untilAllIsRead(): Promise<void> {
    const streams = [this.channel, this.child.stdout, this.child.stderr].filter((stream) => stream !== null);
    const open = streams.filter((stream) => !stream.closed);
    const closed = Promise.all(open.map((stream) => once(stream, 'close')));
    // A worker that was frozen finds its time over, and what the process had said still to be read, in the next turn.
    await within(READ_WITHIN_MS, 'reading', closed).catch(() => new Promise((resolve) => setImmediate(resolve)));
    for (const stream of streams) stream.destroy();
  }

  private send(message: ToTask): void {
    // To one that has just ended it goes nowhere, which its end tells.
    if (this.channel?.writable) this.channel.write(toLine(message));
  }
}

function environment(runId: string, inherit: readonly string[]): NodeJS.ProcessEnv {
  const names = [...INHERITED, ...inherit].filter((name) => process.env[name] !== undefined);
  return { ...Object.fromEntries(names.map((name) => [name, process.env[name]])), [RUN_ID_VARIABLE]: runId };
}
