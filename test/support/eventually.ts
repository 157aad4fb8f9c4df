import { setTimeout as sleep } from 'node:timers/promises';

/** Long enough for a busy machine; a test that gets here is stuck. */
const DEADLINE_MS = 30_000;

/** Waits until `look` returns something truthy, and returns it; otherwise fails with what was last seen. */
export async function eventually<T>(what: string, look: () => Promise<T> | T, deadlineMs = DEADLINE_MS) {
  const deadline = Date.now() + deadlineMs;
  let seen: unknown;
  let pauseMs = 10;
  do {
    try {
      const value = await look();
      if (value) return value as Exclude<T, false | null | undefined | 0 | ''>;
      seen = value;
    } catch (error) {
      seen = error;
    }
    await sleep(pauseMs);
    // What takes long anyway is asked for less often, to leave the processor to what is tested.
    pauseMs = Math.min(1.2 * pauseMs, 50);
  } while (Date.now() < deadline);
  throw new Error(
    `Not within ${deadlineMs} ms: ${what}; last seen: ${seen instanceof Error ? seen.message : JSON.stringify(seen)}`,
  );
}
