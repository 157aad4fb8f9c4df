import { readlinkSync } from 'node:fs';
import { readdir, readFile } from 'node:fs/promises';

/**
 * Environment variable that names the run, in its task and so in everything that the task starts, wherever it hides.
 */
export const RUN_ID_VARIABLE = 'SCENARIO_RUN_ID';

/**
 * Whether /proc shows the processes, and by the numbers that they have here. On other systems, and in some sandboxes,
 * there is none; and in a PID namespace that has not mounted its own, it is that of another, whose numbers belong to
 * strangers here. Without it, only whole groups are seen.
 */
export const SEES_PROCESSES = process.platform === 'linux' && isOurs('/proc/self');

function isOurs(self: string): boolean {
  try {
    return readlinkSync(self) === String(process.pid);
  } catch {
    return false;
  }
}

const NAME = Buffer.from(`${RUN_ID_VARIABLE}=`);
/** How much of a run's id is read. */
const MOST_ID = 64;

/** How many processes are read at the same time; fewer while file descriptors are short. */
const MOST_AT_ONCE = 16;
let atOnce = MOST_AT_ONCE;
/** How many times one look checks for processes that have begun meanwhile. */
const ROUNDS = 10;

/**
 * A process, and the runs that its environment names: undefined while it is being loaded or is ending, and shows none.
 */
type Process = { pid: number; groupId: number; named: string[] | undefined };

let next: Promise<Process[]> | undefined;
let last: Promise<unknown> = Promise.resolve();

/**
 * All running processes. One look serves everyone who asks before it begins: if many runs end at once and each looked
 * by itself, none would be done in time. A look that began before a request proves nothing for it.
 */
export function runningProcesses(): Promise<Process[]> {
  next ??= last.then(() => {
    next = undefined;
    const processes = readProcesses();
    last = processes.catch(() => undefined);
    return processes;
  });
  return next;
}

/** Whether there were too few file descriptors. */
export function isTooManyFiles(error: unknown): boolean {
  return ['EMFILE', 'ENFILE'].includes((error as NodeJS.ErrnoException).code ?? '');
}

/**
 * All running processes; a zombie is not running. Processes that begin meanwhile are read as well, unless new ones keep
 * coming.
 */
async function readProcesses(): Promise<Process[]> {
  const processes: Process[] = [];
  const seen = new Set<string>();
  try {
    for (let round = 0; round < ROUNDS; round++) {
      const pids = (await readdir('/proc')).filter((name) => /^\d+$/.test(name) && !seen.has(name));
      if (pids.length === 0) break;
      for (const pid of pids) seen.add(pid);
      while (pids.length > 0) {
        const read = await Promise.all(pids.splice(0, atOnce).map(readProcess));
        processes.push(...read.filter((one) => one !== undefined));
      }
    }
  } catch (error) {
    if (isTooManyFiles(error)) atOnce = Math.ceil(atOnce / 2);
    throw error;
  }
  atOnce = Math.min(2 * atOnce, MOST_AT_ONCE);
  return processes;
}

async function readProcess(pid: string): Promise<Process | undefined> {
  try {
    const [state, , group] = await statOf(pid);
    if (state === 'X') return undefined;
    // Other threads of a zombie may still run. Its first thread no longer shows an environment, but they do.
    const thread = state === 'Z' ? (await readdir(`/proc/${pid}/task`)).find((id) => id !== pid) : undefined;
    if (state === 'Z' && thread === undefined) return undefined;
    const found = { pid: Number(pid), groupId: Number(group) };
    // A process of the kernel, or from outside this container.
    if (found.groupId === 0) return undefined;
    return { ...found, named: await runsNamedBy(thread ? `${pid}/task/${thread}` : pid) };
  } catch (error) {
    if (isTooManyFiles(error)) throw error;
    return undefined; // It has ended.
  }
}

/** The runs that an environment names. `place` is the path of a process or a thread below /proc. */
async function runsNamedBy(place: string): Promise<string[] | undefined> {
  try {
    // Not as text: many large environments together would be too much for the watchdog.
    const environment = await readFile(`/proc/${place}/environ`);
    if (environment.length === 0 && !(await hasNoEnvironment(place))) return undefined;
    const runIds: string[] = [];
    for (let at = environment.indexOf(NAME); at >= 0; at = environment.indexOf(NAME, at + 1)) {
      const [runId = ''] = environment.toString('latin1', at + NAME.length, at + NAME.length + MOST_ID).split('\0', 1);
      runIds.push(runId);
    }
    return runIds;
  } catch (error) {
    if (isTooManyFiles(error)) throw error;
    return []; // It has ended, or we may not read it.
  }
}

/** The group of a process; `NaN` if it has ended. */
export async function groupOf(pid: number): Promise<number> {
  return Number((await statOf(`${pid}`).catch(() => []))[2]);
}

/** The fields of a process's `stat` after its command, which may contain anything: state, parent, group, … */
async function statOf(place: string): Promise<string[]> {
  const stat = await readFile(`/proc/${place}/stat`, 'latin1');
  return stat.slice(stat.lastIndexOf(')') + 2).split(' ');
}

/**
 * Whether a process was started without any environment. While it is being loaded or is ending, it has no place for
 * one.
 */
async function hasNoEnvironment(place: string): Promise<boolean> {
  const [start, end] = (await statOf(place)).slice(47, 49);
  return start === end && end !== '0';
}
