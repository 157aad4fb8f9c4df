import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { type Duplex } from 'node:stream';
import { within } from '../../../infrastructure/within';
import { type StopKind } from '../job-status';
import { readLines } from './lines';
import { isInGroup, killTrees, type ProcessTree, signalGroup } from './process-tree';
import { RUN_ID_VARIABLE } from './running-processes';
import {
  MAX_MESSAGE,
  parseFromTask,
  PROGRESS_EVERY_MS,
  type StopReason,
  type TaskError,
  toLine,
  type ToTask,
} from './task-messages';
import { type OnOutput, type TaskOutput, watchOutput } from './task-output';

/** What a task inherits of the worker's environment, besides the variables that the settings name: no credentials. */
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
 * A process that has not sent `ready` by then never will: Node can hang at its start if the system has no threads for
 * it.
 */
const READY_WITHIN_MS = 60_000;
/** A task that has returned or thrown has nothing left to do but to end. */
const EXIT_WITHIN_MS = 1000;
/** How soon the system reports the end of a dead process. */
const END_SEEN_WITHIN_MS = 1000;
/** Once the whole tree is dead, everything that it has sent can be read at once. */
const READ_WITHIN_MS = 200;
/**
 * How many characters that are not messages are read from one run; each such line counts for at least `STRANGE_LINE`,
 * because reading it keeps others waiting.
 */
const MAX_STRANGE = 4 * MAX_MESSAGE;
const STRANGE_LINE = MAX_STRANGE / 100;
/** Messages beyond this many, plus twice as many as a task sends in that time, count as strange as well. */
const MANY_MESSAGES = 100;
/** How a process was stopped, by the signal that ended it, whether we sent it or the watchdog did. */
const ENDED_BY: Record<string, StopKind> = { SIGTERM: 'terminated', SIGKILL: 'killed' };
/** How V8 ends a process that is out of memory; a process that only prints such words ends otherwise. */
const ABORTED = new Set<string | number | null>(['SIGABRT', 'SIGTRAP', 134, 133]);

type TaskOptions = {
  runId: string;
  memoryMb: number;
  /** Names of further variables to inherit. */
  inherit: readonly string[];
  stop: { ackMs: number; graceMs: number; killMs: number };
  onProgress: (progress: unknown) => void;
  onOutput: OnOutput;
  /** Called with the processes of the tree that live on although they were killed. */
  onSurvivors: (pids: number[]) => void;
  /** Called when nobody can tell for long whether the tree is dead, for want of file descriptors. */
  onBlind: () => void;
};

/** How a run's process ended, if nobody stopped it first. */
export type TaskEnd =
  | { kind: 'returned'; result: string | undefined }
  | { kind: 'threw'; error: TaskError; detail?: string }
  /** Its module could not be loaded. */
  | { kind: 'not loaded'; detail: string }
  /** The system had no process for it, or lacked what Node needs to start. */
  | { kind: 'not started' }
  /** It ended without reporting an end. */
  | ({ kind: 'exited'; outOfMemory: boolean; detail: string | undefined } & Exit);

type Exit = { code: number | null; signal: NodeJS.Signals | null };
/** Even the first process of the tree can be one that cannot be killed. */
type Unkillable = { survivors: number[] };

/**
 * One run of a task: a process of its own that leads a process group of its own, and waits to be told what to do. When
 * `ended` resolves, no process of the tree lives any more, unless it cannot be killed: for that there is `gone`.
 */
export class TaskProcess {
  readonly tree: ProcessTree;
  /** Resolves once the process waits to be told what to do. */
  readonly ready: Promise<void>;
  /** How the task ended, and how its process did: by itself, or by which signal. */
  readonly ended: Promise<{ end: TaskEnd; how: StopKind }>;
  private readonly child: ChildProcess;
  private readonly channel: Duplex | null;
  private readonly output: TaskOutput;
  private end: TaskEnd | undefined;
  private uncaught: string | undefined;
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
    // Not Node's own IPC channel: what a task writes there can end the worker.
    this.child = spawn(process.execPath, [...flags, join(__dirname, '../../../main.task.js')], {
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe', 'pipe'],
      env: environment(runId, inherit),
    });
    // If the process could not be started, `ended` tells the rest. Without file descriptors it has no stdio either.
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

  /** Has the process load the task module at this path and call it. Does nothing once it has been told to stop. */
  start(module: string, input: Record<string, unknown>): void {
    if (!this.stopping) this.send({ kind: 'start', module, input });
  }

  /**
   * Ends the task, whatever it is doing. First asks it to stop. If it acknowledges, it has the grace to clean up; if it
   * does not, it computes without yielding, and no grace would help. Then SIGTERM, then SIGKILL, each to the whole
   * group. Further calls do nothing.
   */
  stop(reason: StopReason): void {
    if (this.stopping) return;
    this.stopping = true;
    this.send({ kind: 'stop', reason });
    this.after(this.options.stop.ackMs, () => this.terminate());
  }

  /** Resolves once nothing of the tree lives: perhaps long after `ended`, or never. */
  async gone(): Promise<void> {
    await this.ended;
    while (this.survivors.length > 0) {
      // The number of a group in which nothing lives may be another group's by now.
      const groupId = (await isInGroup(this.survivors, this.tree.groupId)) ? this.tree.groupId : 0;
      this.survivors = await killTrees([{ ...this.tree, groupId }]);
    }
  }

  /** Whether the task has returned or thrown. */
  get hasEnded(): boolean {
    return this.end !== undefined;
  }

  /**
   * Sets the timer, in place of what it was set for before. When the time is over, what the process has sent meanwhile
   * is read first: a worker that was kept from running would find every timer expired before it reads the channel.
   */
  private after(milliseconds: number, act: () => void): void {
    clearTimeout(this.timer);
    const timer = setTimeout(() => setImmediate(() => this.timer === timer && act()), milliseconds);
    this.timer = timer;
  }

  /** Cancels the timer, even if it has just expired and would act in this very turn. */
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
    // This also kills what has left the group, and does not wait for the task's end, which a tracer can prevent.
    killTrees([this.tree]).then(
      // Nor is the end of a dead process waited for without limit: a debugger can keep it to itself.
      (survivors) => void setTimeout(() => this.giveUp({ survivors }), survivors.length > 0 ? 0 : END_SEEN_WITHIN_MS),
      // The group has had its SIGKILL all the same; when its first process has ended, what is left is looked for again.
      () => undefined,
    );
  }

  /**
   * Signals the group. Returns false once the process has been reaped: its group's id may be another group's by now.
   */
  private signal(signal: NodeJS.Signals, how: StopKind): boolean {
    if (this.child.exitCode !== null || this.child.signalCode !== null) return false;
    this.how = how;
    signalGroup(this.tree.groupId, signal);
    return true;
  }

  /** Handles a line from the process. Returns false if no more are wanted. */
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
      case 'uncaught':
        this.uncaught = message.detail;
        return;
      case 'returned':
      case 'threw':
      case 'not loaded':
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

  /** Whether the process has sent more messages than a task needs to: reading them also keeps others waiting. */
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
    this.survivors = 'survivors' in exit ? exit.survivors : await killTrees([this.tree], this.options.onBlind);
    if (this.survivors.length > 0) this.options.onSurvivors(this.survivors);
    await this.untilAllIsRead();
    // A process that is asked to stop kills itself after its last message. That SIGKILL is not ours, so it is
    // `graceful`.
    if (this.end) return { end: this.end, how: this.how };
    const { code, signal } = 'survivors' in exit ? { code: null, signal: null } : exit;
    const how = ENDED_BY[signal ?? ''] ?? this.how;
    if (!this.isReady) return { end: { kind: 'not started' }, how };
    const outOfMemory = this.output.saysOutOfMemory && ABORTED.has(signal ?? code);
    return { end: { kind: 'exited', code, signal, outOfMemory, detail: this.uncaught }, how };
  }

  /** Waits until all output is read. Nothing that writes is left, unless it hides well: nobody waits for that. */
  private async untilAllIsRead(): Promise<void> {
    const streams = [this.channel, this.child.stdout, this.child.stderr].filter((stream) => stream !== null);
    const open = streams.filter((stream) => !stream.closed);
    const closed = Promise.all(open.map((stream) => once(stream, 'close')));
    // A worker that was frozen finds its time over before it has read what the process sent: the next turn reads that.
    await within(READ_WITHIN_MS, 'reading', closed).catch(() => new Promise((resolve) => setImmediate(resolve)));
    for (const stream of streams) stream.destroy();
  }

  private send(message: ToTask): void {
    // A message to a process that has just ended goes nowhere; its end tells the rest.
    if (this.channel?.writable) this.channel.write(toLine(message));
  }
}

function environment(runId: string, inherit: readonly string[]): NodeJS.ProcessEnv {
  const names = [...INHERITED, ...inherit].filter((name) => process.env[name] !== undefined);
  return { ...Object.fromEntries(names.map((name) => [name, process.env[name]])), [RUN_ID_VARIABLE]: runId };
}
