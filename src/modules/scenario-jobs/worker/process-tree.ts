import { readlinkSync } from 'node:fs';
import { readdir, readFile } from 'node:fs/promises';
import { RUN_ID_VARIABLE } from './task-messages';

/**
 * A task's process group, led by its first process, and the run that the environment of every process in the tree
 * names.
 */
export type ProcessTree = { groupId: number; runId: string };

/** Sends a signal to every process of the group. Returns false if none is left. */
export function signalGroup(groupId: number, signal: NodeJS.Signals | 0): boolean {
  // A process that could not be started has no group, and group 0 would be our own.
  if (groupId <= 0) return false;
  try {
    process.kill(-groupId, signal);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ESRCH'; // Otherwise it is there, but we may not signal it.
  }
}

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
/**
 * A process that lives this long after SIGKILL survives it: it is not ours to kill (a setuid program), or the kernel
 * holds it.
 */
const SURVIVES_MS = 10_000;
/** How many times one look checks for processes that have begun meanwhile. */
const ROUNDS = 10;

/**
 * Kills process trees. Returns what survived SIGKILL: nothing, as a rule. Each group gets one signal as a whole, which
 * no process in it can escape by forking. On Linux, processes that left their group (`setsid`, a daemon) are killed as
 * well: they are found by the run's id in their environment, as build servers do. Not found are a process that clears
 * its environment as well, and processes that each start the next and end faster than they can be looked for.
 *
 * A process that one look does not see can still be alive: a daemon that began where the look had already been, while
 * its parent ended before the look reached it, or a program that is just being loaded. So it takes two looks in a row
 * that find nothing, and nothing unsure. While there are too few file descriptors for a look, it goes on trying, and
 * calls `onBlind` once if that takes long.
 */
export async function killTrees(trees: readonly ProcessTree[], onBlind?: () => void): Promise<number[]> {
  const groups = new Set(trees.map(({ groupId }) => groupId));
  const runIds = trees.map(({ runId }) => runId);
  let clean = 0;
  let began: number | undefined;
  let blindSince: number | undefined;
  const seen = new Map<number, number>();
  for (let wait = 1; ;) {
    // A group that has ended has ended for good: its number may be another group's from then on.
    for (const groupId of groups) if (!signalGroup(groupId, 'SIGKILL')) groups.delete(groupId);
    const found = await look(groups, runIds).catch(unlessTooManyFiles);
    const members = found?.members ?? [];
    const now = performance.now();
    blindSince = found ? undefined : (blindSince ?? now);
    if (blindSince !== undefined && now - blindSince > SURVIVES_MS) {
      onBlind?.();
      onBlind = undefined;
    }
    for (const pid of members) {
      kill(pid);
      if (!seen.has(pid)) seen.set(pid, now);
    }
    if (found && members.length === 0) {
      began ??= now;
      clean = found.unsure.length === 0 ? clean + 1 : 0;
      if (clean === 2 || now - began > UNSURE_MS) return [];
      wait = 1;
    } else {
      const lived = members.length > 0 ? now - Math.max(...members.map((pid) => seen.get(pid) as number)) : 0;
      if (lived > SURVIVES_MS) return members;
      began = undefined;
      clean = 0;
      wait = Math.min(2 * wait, lived > 1000 ? 500 : 50);
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

/**
 * What a look sees: processes of certain groups and runs, and others that do not show whose they are, because they are
 * being loaded or are ending.
 */
type Look = { members: number[]; unsure: number[] };
/** How long such unsure processes are waited for: on a busy machine there can always be some, none of them ours. */
const UNSURE_MS = 1000;

/** If a look is not possible, it must be repeated: what was not seen must not be taken for dead. */
function unlessTooManyFiles(error: unknown): undefined {
  if (!isTooManyFiles(error)) throw error;
  atOnce = Math.ceil(atOnce / 2);
}

function isTooManyFiles(error: unknown): boolean {
  return ['EMFILE', 'ENFILE'].includes((error as NodeJS.ErrnoException).code ?? '');
}

function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch {
    // It has just ended by itself, or belongs to another user by now.
  }
}

/** Whether one of these processes, as `killTrees` returns them, lives in this group. */
export async function isInGroup(pids: readonly number[], groupId: number): Promise<boolean> {
  // Where single processes cannot be read, a group, as a negative number, stands for its members.
  const groups = pids.map(async (pid) => (pid < 0 ? -pid : Number((await statOf(`${pid}`).catch(() => []))[2])));
  return (await Promise.all(groups)).includes(groupId);
}

/** The running processes of these groups and these runs. */
export async function livingMembers(groups: ReadonlySet<number>, runIds: readonly string[]): Promise<number[]> {
  return (await look(groups, runIds)).members;
}

async function look(groups: ReadonlySet<number>, runIds: readonly string[]): Promise<Look> {
  if (!SEES_PROCESSES) {
    const members = [...groups].filter((groupId) => signalGroup(groupId, 0)).map((groupId) => -groupId);
    return { members, unsure: [] };
  }
  const seen: Look = { members: [], unsure: [] };
  for (const { pid, groupId, named } of await lookAtAll()) {
    if (groups.has(groupId) || named?.some((runId) => runIds.includes(runId))) seen.members.push(pid);
    else if (!named) seen.unsure.push(pid);
  }
  return seen;
}

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
function lookAtAll(): Promise<Process[]> {
  next ??= last.then(() => {
    next = undefined;
    const processes = readProcesses();
    last = processes.catch(() => undefined);
    return processes;
  });
  return next;
}

/**
 * All running processes; a zombie is not running. Processes that begin meanwhile are read as well, unless new ones keep
 * coming.
 */
async function readProcesses(): Promise<Process[]> {
  const processes: Process[] = [];
  const seen = new Set<string>();
  for (let round = 0; round < ROUNDS; round++) {
    const pids = (await readdir('/proc')).filter((name) => /^\d+$/.test(name) && !seen.has(name));
    if (pids.length === 0) break;
    for (const pid of pids) seen.add(pid);
    while (pids.length > 0) {
      const read = await Promise.all(pids.splice(0, atOnce).map(readProcess));
      processes.push(...read.filter((one) => one !== undefined));
    }
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
