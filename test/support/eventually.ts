import { setTimeout as sleep } from 'node:timers/promises';

/** Long enough for a busy machine; a test that gets here is stuck. */
const DEADLINE_MS = 30_000;

/** Waits until `look` returns something truthy, and returns it; fails with what was last seen. */
export async function eventually<T>(what: string, look: () => Promise<T> | T, deadlineMs = DEADLINE_MS) {
  const deadline = Date.now() + deadlineMs;
  let seen: unknown;
  do {
    try {
      const value = await look();
      if (value) return value as Exclude<T, false | null | undefined | 0 | ''>;
      seen = value;
    } catch (error) {
      seen = error;
    }
    await sleep(10);
  } while (Date.now() < deadline);
  throw new Error(
    `Not within ${deadlineMs} ms: ${what}; last seen: ${seen instanceof Error ? seen.message : JSON.stringify(seen)}`,
  );
}
