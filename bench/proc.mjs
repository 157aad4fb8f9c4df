// What the system says about processes: memory and processor time. Linux only.
import { readdirSync, readFileSync } from 'node:fs';

const TICKS_PER_SECOND = 100;

function statOf(pid) {
  const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
  // pid (command) state parent …: utime, stime, cutime and cstime are the 14th to the 17th.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return { parent: Number(fields[1]), ticks: fields.slice(11, 15).map(Number) };
}

/** The living processes that a process has started. */
export function childrenOf(pid) {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((child) => {
      try {
        return statOf(child).parent === pid;
      } catch {
        return false; // It has just ended.
      }
    });
}

/** Seconds of processor time, user and system, of the process and, if asked for, of its children, ended and living. */
export function cpuSeconds(pid, { withChildren = false } = {}) {
  const [user, system, endedUser, endedSystem] = statOf(pid).ticks;
  let ticks = user + system;
  if (withChildren) {
    ticks += endedUser + endedSystem;
    for (const child of childrenOf(pid)) ticks += statOf(child).ticks[0] + statOf(child).ticks[1];
  }
  return ticks / TICKS_PER_SECOND;
}

/**
 * Resident megabytes, and the proportional share of them, in which memory shared by several processes counts once in
 * all.
 */
export function memoryOf(pid) {
  const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, 'latin1');
  const megabytes = (name) => Number(new RegExp(`^${name}: *(\\d+) kB`, 'm').exec(rollup)[1]) / 1024;
  return { residentMb: megabytes('Rss'), shareMb: megabytes('Pss') };
}
