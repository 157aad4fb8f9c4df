// The processes that a script starts: each in a group of its own, so that Ctrl-C reaches the script alone, and each
// recorded in a file, so that the next start can end what a killed script left behind.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, existsSync, mkdirSync, openSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

/**
 * When a process started, which distinguishes it from a later one with the same number; undefined if it does not run or
 * is a zombie. (A command line would not do: Redis changes its own.)
 */
function birthOf(pid) {
  if (process.platform !== 'linux') {
    const { stdout } = spawnSync('ps', ['-o', 'stat=,lstart=', '-p', String(pid)], { encoding: 'utf8' });
    const [, state, started] = /^\s*(\S+)\s+(.+?)\s*$/.exec(stdout ?? '') ?? [];
    return state?.startsWith('Z') ? undefined : started;
  }
  try {
    // The line is `pid (command) state …`; the start time is the 22nd field, in ticks since the machine booted.
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    if (fields[0] === 'Z' || fields[0] === 'X') return undefined;
    return `${readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim()} ${fields[19]}`;
  } catch {
    return undefined;
  }
}

function lives({ child, pid, birth }) {
  if (child) return pid !== undefined && child.exitCode === null && child.signalCode === null;
  return birth !== undefined && birthOf(pid) === birth;
}

export function lastLines(file, count = 10) {
  return existsSync(file) ? readFileSync(file, 'utf8').trim().split('\n').slice(-count).join('\n') : '';
}

export class Processes {
  #file;
  #started = [];
  #stopping = false;

  /** Opens `folder`, which holds the list of processes and their logs. Ends what an earlier script left there. */
  static async open(folder) {
    mkdirSync(folder, { recursive: true });
    const file = join(folder, 'processes.json');
    if (existsSync(file)) {
      const { owner, processes } = JSON.parse(readFileSync(file, 'utf8'));
      if (owner.pid !== process.pid && lives(owner)) {
        throw new Error(
          `It is running already in this folder, as process ${owner.pid}. Use that one, or end it first: ` +
            `with Ctrl-C in its terminal, or with \`kill ${owner.pid}\`.`,
        );
      }
      for (const entry of processes.reverse()) await end(entry, 'SIGTERM', 5000);
    }
    const opened = new Processes();
    opened.folder = folder;
    opened.#file = file;
    opened.#save();
    return opened;
  }

  /**
   * Starts a program; what it prints goes to `<folder>/<name>.log`, or where `options.stdio` says. `onExit` is told why
   * it ended, unless it was stopped.
   */
  start(name, command, args, { onExit, stopSignal = 'SIGTERM', killSignal = 'SIGKILL', ...options } = {}) {
    if (this.#stopping) throw new Error(`${name} is not started: everything is being stopped`);
    const file = options.stdio ? undefined : join(this.folder, `${name}.log`);
    const log = file && openSync(file, 'a', 0o600);
    const child = spawn(command, args, { stdio: ['ignore', log, log], detached: true, ...options });
    if (log !== undefined) closeSync(log);
    const entry = { name, child, pid: child.pid, birth: child.pid && birthOf(child.pid), stopSignal, killSignal };
    this.#started.push(entry);
    this.#save();
    child.on('error', (error) => onExit?.(`${name} could not be started: ${error.message}`));
    child.on('exit', (code, signal) => {
      if (this.#stopping) return;
      const why = `${name} ended by itself (${signal ?? `exit code ${code}`})`;
      onExit?.(file ? `${why}. Its log ends:\n${lastLines(file)}` : why);
    });
    return child;
  }

  /**
   * Runs a program to its end, and returns what it printed. If it fails, throws an error with what it wrote to stderr.
   */
  async run(name, command, args, options = {}) {
    const child = this.start(name, command, args, { ...options, stdio: ['ignore', 'pipe', 'pipe'] });
    const printed = { stdout: '', stderr: '' };
    for (const stream of ['stdout', 'stderr']) {
      child[stream].setEncoding('utf8').on('data', (text) => (printed[stream] += text));
    }
    const [code, signal] = await once(child, 'close');
    if (code !== 0) throw new Error(`${name} failed (${signal ?? `exit code ${code}`})\n${printed.stderr.trim()}`);
    return printed.stdout.trim();
  }

  pidOf(name) {
    return this.#started.findLast((entry) => entry.name === name)?.pid;
  }

  /** Ends everything, the last started first. Each process gets its stop signal, and SIGKILL if it takes too long. */
  async stop({ patienceMs = 40_000, say = () => undefined } = {}) {
    this.#stopping = true;
    for (const entry of [...this.#started].reverse()) {
      if (!lives(entry)) continue;
      await end(entry, entry.stopSignal, patienceMs);
      say(`  ${entry.name} stopped`);
    }
    rmSync(this.#file, { force: true });
  }

  /** Ends everything at once, without waiting. */
  kill() {
    this.#stopping = true;
    for (const entry of [...this.#started].reverse()) {
      if (lives(entry)) send(-entry.pid, entry.killSignal);
    }
    rmSync(this.#file, { force: true });
  }

  #save() {
    const owner = { pid: process.pid, birth: birthOf(process.pid) };
    const processes = this.#started.filter(lives).map(({ name, pid, birth }) => ({ name, pid, birth }));
    // A script that is killed here leaves the old list or the new one, never half of one.
    writeFileSync(`${this.#file}.part`, JSON.stringify({ owner, processes }), { mode: 0o600 });
    renameSync(`${this.#file}.part`, this.#file);
  }
}

async function end(entry, signal, patienceMs) {
  const deadline = Date.now() + patienceMs;
  if (lives(entry)) send(entry.pid, signal);
  while (lives(entry) && Date.now() < deadline) await sleep(20);
  if (lives(entry)) send(-entry.pid, 'SIGKILL');
  while (lives(entry)) await sleep(20);
}

function send(target, signal) {
  try {
    process.kill(target, signal);
  } catch (error) {
    // ESRCH: it has just ended by itself.
    if (error.code !== 'ESRCH') throw error;
  }
}
