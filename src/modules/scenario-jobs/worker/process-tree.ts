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

/** So many processes are looked at at the same time: what they hold must fit into the watchdog. */
const AT_ONCE = 16;

/**
 * Kills trees and returns when nothing of them lives. Each group gets one signal as a whole, which no process in it
 * can escape by forking. Beside the groups themselves these are, on Linux, processes that left them (`setsid`, a
 * daemon): they are found by the run's id in their environment, as build servers do. One that clears its environment
 * as well is not found, nor one that forks faster than it can be looked for.
 */
export async function killTrees(trees: readonly ProcessTree[]): Promise<void> {
  const groups = new Set(trees.map(({ groupId }) => groupId));
  const runIds = trees.map(({ runId }) => runId);
  for (let wait = 1; ; wait = Math.min(2 * wait, 50)) {
    // A group that has ended has ended for good: its number may be somebody else's from then on.
    for (const groupId of groups) if (!signalGroup(groupId, 'SIGKILL')) groups.delete(groupId);
    const members = await livingMembers(groups, runIds).catch(unlessTooManyFiles);
    if (members?.length === 0) return;
    for (const pid of members ?? []) kill(pid);
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

/** Who cannot look must look again, and not take what was not seen for dead. */
function unlessTooManyFiles(error: unknown): undefined {
  if (!isTooManyFiles(error)) throw error;
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

/** The processes that run of these groups and these runs; a zombie does not run. */
export async function livingMembers(groups: ReadonlySet<number>, runIds: readonly string[]): Promise<number[]> {
  if (process.platform !== 'linux') {
    return [...groups].filter((groupId) => signalGroup(groupId, 0)).map((groupId) => -groupId);
  }
  const markers = runIds.map((runId) => `${RUN_ID_VARIABLE}=${runId}\0`);
  const pids = (await readdir('/proc')).filter((name) => /^\d+$/.test(name));
  const living: number[] = [];
  while (pids.length > 0) {
    const found = await Promise.all(pids.splice(0, AT_ONCE).map((pid) => isMember(pid, groups, markers)));
    living.push(...found.filter((pid) => pid !== undefined));
  }
  return living;
}

async function isMember(pid: string, groups: ReadonlySet<number>, markers: string[]): Promise<number | undefined> {
  try {
    // pid (command) state parent group …; the command may contain anything, also parentheses.
    const stat = await readFile(`/proc/${pid}/stat`, 'latin1');
    const [state, , group] = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    if (state === 'Z' || state === 'X') return undefined;
    if (groups.has(Number(group))) return Number(pid);
    const environment = `${await readFile(`/proc/${pid}/environ`, 'latin1')}\0`;
    return markers.some((marker) => environment.includes(marker)) ? Number(pid) : undefined;
  } catch (error) {
    if (isTooManyFiles(error)) throw error;
    return undefined; // It has ended, or is not ours to look at.
  }
}
