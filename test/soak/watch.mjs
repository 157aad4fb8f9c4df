import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

export const LOOK_EVERY_MS = 20;

/** Watches the process of every run, from when its task reports that it runs until the process is dead. */
export class Watch {
  runs = new Map();
  #alive = new Set();
  #begun = new Set();
  #read = 0;

  constructor(world) {
    this.world = world;
    this.timer = setInterval(() => this.look(), LOOK_EVERY_MS);
  }

  stop() {
    clearInterval(this.timer);
    this.look();
  }

  look() {
    const reported = this.world.reportedRuns(this.#read);
    this.#read = reported.next;
    for (const run of reported.runs) {
      this.runs.set(run.runId, run);
      this.#alive.add(run);
      this.#begun.add(run.jobId);
    }
    const now = Date.now();
    for (const run of this.#alive) {
      if (isAlive(run.pid)) continue;
      run.diedAt = now;
      this.#alive.delete(run);
    }
  }

  /** Returns once a run of the job has begun, or after `limitMs`. */
  async untilRuns(jobId, limitMs) {
    for (const end = Date.now() + limitMs; Date.now() < end; await sleep(LOOK_EVERY_MS)) {
      if (this.#begun.has(jobId)) return;
    }
  }
}

function isAlive(pid) {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    return !/^[ZX]/.test(stat.slice(stat.lastIndexOf(')') + 2));
  } catch {
    return false;
  }
}

/** Living processes that carry the run id of one of these runs, whatever their group. */
export function leftOver(runIds) {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name) && isAlive(name))
    .flatMap((pid) => {
      try {
        const environment = readFileSync(`/proc/${pid}/environ`, 'latin1');
        const runId = /(?:^|\0)SCENARIO_RUN_ID=([^\0]*)/.exec(environment)?.[1];
        return runIds.has(runId) ? [{ pid: Number(pid), runId }] : [];
      } catch {
        return []; // It has ended, or is another user's.
      }
    });
}
