import { readdir, readFile } from 'node:fs/promises';
import { RUN_ID_VARIABLE } from './task-messages';

/** A task's process group, which its first process leads, and the run that the environment of all of them names. */
export type ProcessTree = { groupId: number; runId: string };

/** Sends a signal to every process of the group. False when there is none left. */
export function signalGroup(groupId: number, signal: NodeJS.Signals | 0): boolean {
  // Group 0 would be our own: a process that could not be started has no group.
  if (groupId <= 0) return false;
  try {
    process.kill(-groupId, signal);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ESRCH'; // Else it is there, and not ours to signal.
  }
}

const NAME = Buffer.from(`${RUN_ID_VARIABLE}=`);
/** As much of a run's id as is read. */
const MOST_ID = 64;

/** So many processes are looked at at the same time; fewer while there are too few file descriptors for that. */
const MOST_AT_ONCE = 16;
let atOnce = MOST_AT_ONCE;
/**
 * What still lives this long after SIGKILL lives on: it is not ours to kill (setuid programs), or the kernel holds it.
 */
const SURVIVES_MS = 10_000;
/** So often one look looks for what has begun meanwhile. */
const ROUNDS = 10;

/**
 * Kills trees. Returns what has survived SIGKILL: nothing, as a rule. Each group gets one signal as a whole, which no
 * process in it can escape by forking. On Linux, processes that left their group (`setsid`, a daemon) are killed as
 * well: they are found by the run's id in their environment, as build servers do. One that clears its environment as
 * well is not found, nor ones that each begin the next and end faster than they can be looked for.
 *
 * What one look does not see can live all the same: a daemon that began behind it while its parent ended before it, or
 * a program that is just being loaded. So it takes two in a row that find nothing and nothing unsure.
 */
export async function killTrees(trees: readonly ProcessTree[]): Promise<number[]> {
  const groups = new Set(trees.map(({ groupId }) => groupId));
  const runIds = trees.map(({ runId }) => runId);
  let clean = 0;
  let began: number | undefined;
  const seen = new Map<number, number>();
  for (let wait = 1; ;) {
    // A group that has ended has ended for good: its number may be somebody else's from then on.
    for (const groupId of groups) if (!signalGroup(groupId, 'SIGKILL')) groups.delete(groupId);
    const found = await look(groups, runIds).catch(unlessTooManyFiles);
    const members = found?.members ?? [];
    const now = performance.now();
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
 * Processes that run of certain groups and runs, and others that are being loaded, or end: whose they are they do not
 * show.
 */
type Look = { members: number[]; unsure: number[] };
/** How long that is waited for: on a busy machine there can always be some, and none of ours. */
const UNSURE_MS = 1000;

/** Who cannot look must look again, and not take what was not seen for dead. */
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
    // It has just ended by itself, or belongs to someone else by now.
  }
}

/** Whether one of these processes, as `killTrees` returns them, lives in this group. */
export async function isInGroup(pids: readonly number[], groupId: number): Promise<boolean> {
  // Where single processes cannot be looked at, a group stands for its members.
  const groups = pids.map(async (pid) => (pid < 0 ? -pid : Number((await statOf(`${pid}`).catch(() => []))[2])));
  return (await Promise.all(groups)).includes(groupId);
}

/** The processes that run of these groups and these runs. */
export async function livingMembers(groups: ReadonlySet<number>, runIds: readonly string[]): Promise<number[]> {
  return (await look(groups, runIds)).members;
}

async function look(groups: ReadonlySet<number>, runIds: readonly string[]): Promise<Look> {
  if (process.platform !== 'linux') {
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

/** A process, and the runs that its environment names; nothing while it is being loaded, or ends, and shows none. */
type Process = { pid: number; groupId: number; named: string[] | undefined };

let next: Promise<Process[]> | undefined;
let last: Promise<unknown> = Promise.resolve();

/**
 * One look serves all who ask before it begins: of many runs that end at once each would look by itself, and none would
 * be done in time. One that began before the request proves nothing about it.
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
 * All processes that run; a zombie does not. Those that begin meanwhile are read as well, unless there are ever more.
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
    // Of a zombie other threads may run on. Its first one shows no environment any more, but they do.
    const thread = state === 'Z' ? (await readdir(`/proc/${pid}/task`)).find((id) => id !== pid) : undefined;
    if (state === 'Z' && thread === undefined) return undefined;
    const found = { pid: Number(pid), groupId: Number(group) };
    // Of the kernel, or from outside of this container.
    if (found.groupId === 0) return undefined;
    return { ...found, named: await runsNamedBy(thread ? `${pid}/task/${thread}` : pid) };
  } catch (error) {
    if (isTooManyFiles(error)) throw error;
    return undefined; // It has ended.
  }
}

/** `place` is that of a process or of a thread below /proc. */
async function runsNamedBy(place: string): Promise<string[] | undefined> {
  try {
    // Not as text: of many that are large together it would be too much for the watchdog.
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
    return []; // It has ended, or is not ours to look into.
  }
}

/** What stands in a process's `stat` behind its command, which may contain anything: state, parent, group, … */
async function statOf(place: string): Promise<string[]> {
  const stat = await readFile(`/proc/${place}/stat`, 'latin1');
  return stat.slice(stat.lastIndexOf(')') + 2).split(' ');
}

/** Whether a process was started without any environment. While it is loaded, or ends, it has no place for one yet. */
async function hasNoEnvironment(place: string): Promise<boolean> {
  const [start, end] = (await statOf(place)).slice(47, 49);
  return start === end && end !== '0';
}
