import { type ChildProcess, fork } from 'node:child_process';
import { join } from 'node:path';
import { Inject, Injectable } from '@nestjs/common';
import { SETTINGS_TOKEN, type Settings } from '../../../config/settings';
import { LOGGER, type Logger } from '../../../infrastructure/logger';
import { type ProcessTree } from './process-tree';
import { type FromWatchdog, HEARTBEAT_MS, type ToWatchdog } from './watchdog-messages';

/** A watchdog is taken for frozen after `WATCHDOG_MS`, but never sooner than this: a busy machine starts it slowly. */
const LEAST_PATIENCE_MS = 10_000;

/**
 * A second process beside the worker that ends the worker's tasks when the worker cannot: at once when the worker dies,
 * and after `WATCHDOG_MS` when it is frozen. A task that computes without yielding would notice neither.
 */
@Injectable()
export class Watchdog {
  private child: ChildProcess | undefined;
  private heartbeat: NodeJS.Timeout | undefined;
  private relaunch: NodeJS.Timeout | undefined;
  private launchedAt = 0;
  /** Heartbeats sent since the watchdog's last one. Not a time: a machine that slept froze both processes alike. */
  private unanswered = 0;
  private readonly trees = new Map<string, ProcessTree>();
  private readonly killed = new Set<string>();

  constructor(
    @Inject(SETTINGS_TOKEN) private readonly settings: Settings,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {}

  start(): void {
    this.launch();
    this.heartbeat = setInterval(() => this.beat(), HEARTBEAT_MS);
  }

  private beat(): void {
    // A frozen watchdog would end no task, so it is killed, and another takes over.
    const patience = Math.max(this.settings.WATCHDOG_MS, LEAST_PATIENCE_MS) / HEARTBEAT_MS;
    if (this.unanswered++ < patience) this.send({ kind: 'heartbeat' });
    else this.child?.kill('SIGKILL');
  }

  stop(): void {
    clearInterval(this.heartbeat);
    clearTimeout(this.relaunch);
    const { child } = this;
    this.child = undefined;
    if (child?.connected) child.disconnect();
  }

  watch(tree: ProcessTree): void {
    this.trees.set(tree.runId, tree);
    this.send({ kind: 'watch', tree });
  }

  forget(tree: ProcessTree): void {
    this.trees.delete(tree.runId);
    this.send({ kind: 'forget', tree });
  }

  /** Whether the watchdog ended this run, having taken this worker for dead. True only once: then it is forgotten. */
  hasKilled(runId: string): boolean {
    return this.killed.delete(runId);
  }

  private launch(): void {
    this.launchedAt = performance.now();
    try {
      this.adopt(this.fork());
    } catch (error) {
      this.launchAgain({ err: error });
    }
  }

  private launchAgain(why: object): void {
    this.logger.error(why, 'watchdog ended, starting another');
    this.child = undefined;
    // At once, because until then nobody watches; but one that ends as soon as it begins must not be restarted in a
    // tight loop.
    this.relaunch = setTimeout(() => this.launch(), Math.max(0, this.launchedAt + HEARTBEAT_MS - performance.now()));
  }

  private fork(): ChildProcess {
    // It gets what it has to watch as an argument: this worker may be dead before it can send a message.
    const args = [String(this.settings.WATCHDOG_MS), JSON.stringify([...this.trees.values()])];
    return fork(join(__dirname, '../../../main.watchdog.js'), args, {
      // A group of its own: what ends the worker, such as Ctrl-C, must not end the watchdog first.
      detached: true,
      stdio: ['ignore', 'ignore', 'ignore', 'ipc'],
      env: {},
      execArgv: ['--max-old-space-size=32'],
    });
  }

  private adopt(child: ChildProcess): void {
    this.child = child;
    this.unanswered = 0;
    child.on('error', (error) => {
      // The system had no process for it, so there will be no `exit` event.
      if (child.pid === undefined && this.child === child) this.launchAgain({ err: error });
    });
    child.on('message', (message: FromWatchdog) => {
      if (message.kind === 'heartbeat') return void (this.unanswered = 0);
      // Otherwise it had just ended by itself.
      if (this.trees.has(message.runId)) this.killed.add(message.runId);
    });
    child.on('exit', (code, signal) => {
      if (this.child === child) this.launchAgain({ code, signal });
    });
  }

  private send(message: ToWatchdog): void {
    if (this.child?.connected) this.child.send(message, () => undefined);
  }
}
