// The processes that a script starts: each in a group of its own, so that Ctrl-C reaches the script alone,
// and each written down, so that the next start can end what a killed script left behind.
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const isAlive = (pid) => {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return error.code === 'EPERM';
  }
};

const commandOf = (pid) =>
  spawnSync('ps', ['-o', 'args=', '-p', String(pid)], { encoding: 'utf8' }).stdout?.trim() ?? '';

export class AlreadyRunning extends Error {}

export class Processes {
  #file;
  #started = [];
  #stopping = false;

  /** `folder` is where the list of processes and their logs are kept. Ends what an earlier script left there. */
  static async open(folder) {
    mkdirSync(folder, { recursive: true });
    const file = join(folder, 'processes.json');
    if (existsSync(file)) {
      const { owner, processes } = JSON.parse(readFileSync(file, 'utf8'));
      if (owner.pid !== process.pid && isAlive(owner.pid) && commandOf(owner.pid) === owner.command) {
        throw new AlreadyRunning(`It is running already in this folder, as process ${owner.pid}`);
      }
      for (const { pid, command } of processes.reverse()) {
        if (isAlive(pid) && commandOf(pid) === command) await end(pid, 'SIGTERM', 5000);
      }
    }
    const opened = new Processes();
    opened.folder = folder;
    opened.#file = file;
    opened.#save();
    return opened;
  }

  /**
   * Starts a program; what it prints goes to `<folder>/<name>.log`, or where `options.stdio` says. `onExit` hears
   * why it ended when nobody stopped it.
   */
  start(name, command, args, { onExit, stopSignal = 'SIGTERM', killSignal = 'SIGKILL', ...options } = {}) {
    const log = openSync(join(this.folder, `${name}.log`), 'a', 0o600);
    const child = spawn(command, args, { stdio: ['ignore', log, log], detached: true, ...options });
    const entry = { name, child, pid: child.pid, command: '', stopSignal, killSignal };
    this.#started.push(entry);
    child.on('error', (error) => onExit?.(error.message));
    child.on('exit', (code, signal) => {
      entry.ended = true;
      if (!this.#stopping) onExit?.(`${name} ended by itself (${signal ?? `exit code ${code}`})`);
    });
    // The command line is read a little later: until exec, it is still ours.
    setTimeout(() => {
      if (entry.ended || !entry.pid) return;
      entry.command = commandOf(entry.pid);
      this.#save();
    }, 100).unref();
    return child;
  }

  pidOf(name) {
    return this.#started.findLast((entry) => entry.name === name)?.pid;
  }

  /** Ends everything, the last started first. Each gets its stop signal, and SIGKILL if it takes too long. */
  async stop({ patienceMs = 40_000, say = () => undefined } = {}) {
    this.#stopping = true;
    for (const { name, pid, child, stopSignal, ended } of [...this.#started].reverse()) {
      if (ended || !pid || child.exitCode !== null || child.signalCode !== null) continue;
      await end(pid, stopSignal, patienceMs);
      say(`  ${name} stopped`);
    }
    rmSync(this.#file, { force: true });
  }

  /** Ends everything at once, without waiting. */
  kill() {
    this.#stopping = true;
    for (const { pid, child, killSignal } of [...this.#started].reverse()) {
      if (pid && child.exitCode === null && child.signalCode === null) {
        try {
          process.kill(-pid, killSignal);
        } catch {
          // It has just ended by itself.
        }
      }
    }
    rmSync(this.#file, { force: true });
  }

  #save() {
    const owner = { pid: process.pid, command: commandOf(process.pid) };
    const processes = this.#started
      .filter((entry) => !entry.ended)
      .map(({ name, pid, command }) => ({ name, pid, command }));
    writeFileSync(this.#file, JSON.stringify({ owner, processes }), { mode: 0o600 });
  }
}

async function end(pid, signal, patienceMs) {
  const deadline = Date.now() + patienceMs;
  try {
    process.kill(pid, signal);
    while (isAlive(pid) && Date.now() < deadline) await sleep(20);
    if (isAlive(pid)) process.kill(-pid, 'SIGKILL');
    while (isAlive(pid)) await sleep(20);
  } catch (error) {
    if (error.code !== 'ESRCH') throw error;
  }
}
