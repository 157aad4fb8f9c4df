import { groupOf, isTooManyFiles, runningProcesses, SEES_PROCESSES } from './running-processes';

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
 * A process that lives this long after SIGKILL survives it: it is not ours to kill (a setuid program), or the kernel
 * holds it.
 */
const SURVIVES_MS = 10_000;
/** How long a look may be impossible before somebody is told. */
const BLIND_MS = 10_000;
/** How long unsure processes are waited for: on a busy machine there can always be some, none of them ours. */
const UNSURE_MS = 1000;

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
    if (blindSince !== undefined && now - blindSince > BLIND_MS) {
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

/** If a look is not possible, it must be repeated: what was not seen must not be taken for dead. */
function unlessTooManyFiles(error: unknown): undefined {
  if (!isTooManyFiles(error)) throw error;
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
  const groups = pids.map(async (pid) => (pid < 0 ? -pid : groupOf(pid)));
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
  for (const { pid, groupId, named } of await runningProcesses()) {
    if (groups.has(groupId) || named?.some((runId) => runIds.includes(runId))) seen.members.push(pid);
    else if (!named) seen.unsure.push(pid);
  }
  return seen;
}
