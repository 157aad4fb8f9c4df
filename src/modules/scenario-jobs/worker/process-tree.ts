import { readdir, readFile } from 'node:fs/promises';
import { RUN_ID_VARIABLE } from './task-messages';

/** A task's process group, which its first process leads, and the run that the environment of all of them names. */
export type ProcessTree = { groupId: number; runId: string };

/** Sends a signal to every process of the group. False when there is none left. */
export function signalGroup({ groupId }: ProcessTree, signal: NodeJS.Signals | 0): boolean {
  // Group 0 would be our own: a process that could not be started has no group.
  if (groupId <= 0) return false;
  try {
    process.kill(-groupId, signal);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ESRCH') return false;
    throw error;
  }
}

/**
 * Kills what is left of a tree and returns when nothing of it lives. Beside the group itself these are, on
 * Linux, processes that left it (`setsid`, a daemon): they are found by the run's id in their environment, as
 * build servers do. One that clears its environment as well is not found; that takes intent.
 */
export async function killTree(tree: ProcessTree): Promise<void> {
  for (let wait = 1; ; wait = Math.min(2 * wait, 50)) {
    const members = await livingMembers(tree);
    if (members.length === 0) return;
    for (const pid of members) {
      try {
        process.kill(pid, 'SIGKILL');
      } catch {
        // It has just ended by itself, or belongs to someone else by now.
      }
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

/** The processes of a tree that run; a zombie does not. */
export async function livingMembers(tree: ProcessTree): Promise<number[]> {
  if (tree.groupId <= 0) return [];
  if (process.platform !== 'linux') return signalGroup(tree, 0) ? [-tree.groupId] : [];
  const pids = (await readdir('/proc')).filter((name) => /^\d+$/.test(name));
  const marker = `${RUN_ID_VARIABLE}=${tree.runId}\0`;
  const living = await Promise.all(
    pids.map(async (pid) => {
      try {
        // pid (command) state parent group …; the command may contain anything, also parentheses.
        const stat = await readFile(`/proc/${pid}/stat`, 'latin1');
        const [state, , group] = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
        if (state === 'Z' || state === 'X') return undefined;
        if (Number(group) === tree.groupId) return Number(pid);
        const environment = await readFile(`/proc/${pid}/environ`, 'latin1');
        return `${environment}\0`.includes(marker) ? Number(pid) : undefined;
      } catch {
        return undefined; // It has ended, or is not ours to look at.
      }
    }),
  );
  return living.filter((pid) => pid !== undefined);
}
