import { setTimeout as sleep } from 'node:timers/promises';

/** How soon to ask again for a locked row: nothing of ours locks one for longer than a statement. */
const AGAIN_MS = 10;
/** The wait doubles up to this: a row locked for so long is locked by somebody else. */
const AGAIN_MOST_MS = 160;
/** How long to keep trying. No connection to Postgres is held meanwhile, so that others are not kept from theirs. */
const LIMIT_MS = 4000;

/** Repeats `attempt` until there is a result. Returns undefined if a row that it needs stays locked. */
export async function untilUnlocked<Result>(attempt: () => Promise<Result | undefined>): Promise<Result | undefined> {
  const deadline = performance.now() + LIMIT_MS;
  for (let waitMs = AGAIN_MS; ; waitMs = Math.min(2 * waitMs, AGAIN_MOST_MS)) {
    const result = await attempt();
    if (result !== undefined || performance.now() > deadline) return result;
    await sleep(waitMs);
  }
}
