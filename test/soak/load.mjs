import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';

/** How long a job may wait behind the others in the queue; after that it is cancelled there. */
const SEEN_WITHIN_MS = 120_000;

/** Longer than a cancelled process may live; see audit.mjs. */
const FOR_EVER_MS = 60_000;

/** The kinds of jobs and how often they occur. The last are those that are cancelled while they run. */
const MIXTURE = [
  [58, (random) => ({ prompt: 'quick', ms: random.between(0, 0) })],
  [22, (random) => waits(random.between(50, 500))],
  [4, (random) => waits(random.between(1000, 3000))],
  [3, (random) => ({ prompt: `spin ${random.between(200, 600)}` })],
  [8, () => ({ prompt: 'flaky' })],
  [5, () => ({ prompt: 'broken' })],
];
const waits = (milliseconds) => ({ prompt: `wait ${milliseconds}`, ms: milliseconds });

/** Every job of the soak: what it does, and when and how it is cancelled. All of it depends on the seed alone. */
export function planJobs(count, random) {
  return Array.from({ length: count }, (_, index) => {
    const plan = { index, ...weighted(random), withRequestId: random.chance(0.8) };
    return random.chance(0.1) ? { ...plan, ...planCancel(random, plan) } : plan;
  });
}

function weighted(random) {
  let left = random.next() * MIXTURE.reduce((sum, [weight]) => sum + weight, 0);
  return MIXTURE.find(([weight]) => (left -= weight) < 0)[1](random);
}

function planCancel(random, plan) {
  const cancel = {
    key: random.chance(0.6) ? randomUUID() : undefined,
    // Whether a second caller, who does not know of the first, cancels as well.
    twice: random.chance(0.2),
  };
  const moment = random.between(1, 10);
  if (moment <= 2) return { cancel: { ...cancel, moment: 'queued', afterMs: random.between(0, 30) } };
  if (moment <= 4) return { cancel: { ...cancel, moment: 'any', afterMs: random.between(0, 3000) } };
  if (moment <= 8) {
    const prompt = `${random.pick(['wait', 'wait', 'spin', 'deaf'])} ${FOR_EVER_MS}`;
    // Its caller must learn the job's id, or nobody cancels it.
    return { prompt, withRequestId: true, cancel: { ...cancel, moment: 'running', afterMs: random.between(0, 600) } };
  }
  const ms = plan.ms || random.between(50, 500);
  return {
    ...waits(ms),
    cancel: { ...cancel, moment: 'finishing', afterMs: Math.max(0, ms + random.between(-60, 60)) },
  };
}

/**
 * Creates the jobs at a steady pace and cancels those that are planned to be. Resolves when every caller has finished.
 */
export async function load({ plans, client, watch, pacePerSecond, say }) {
  const began = performance.now();
  const callers = [];
  for (const plan of plans) {
    await sleep(Math.max(0, began + (plan.index / pacePerSecond) * 1000 - performance.now()));
    callers.push(call(plan, client, watch));
    if ((plan.index + 1) % 250 === 0) say(`${plan.index + 1} jobs`);
  }
  return Promise.all(callers);
}

/** One caller: creates a job, and cancels it if that is planned. Returns everything that the caller was told. */
async function call(plan, client, watch) {
  const body = { user_email: 'ada@example.com', prompt: plan.prompt };
  // Without a request id, a create that was broken off must not be sent again: it may have taken effect.
  const created = plan.withRequestId
    ? await client.insist('POST', '', { body: { ...body, request_id: randomUUID() } })
    : await client.send('POST', '', { body });
  const job = { plan, id: created?.body?.id, created, cancels: [] };
  if (!job.id || !plan.cancel) return job;
  const { cancel } = plan;
  if (cancel.moment === 'running' || cancel.moment === 'finishing') await watch.untilRuns(job.id, SEEN_WITHIN_MS);
  await sleep(cancel.afterMs);
  const keys = cancel.twice ? [cancel.key, randomUUID()] : [cancel.key];
  await Promise.all(keys.map((key) => client.insist('DELETE', `/${job.id}`, { key, jobId: job.id })));
  // A caller that got no answer, or has another reason, asks again with the same key.
  if (cancel.key) await client.insist('DELETE', `/${job.id}`, { key: cancel.key, jobId: job.id });
  return job;
}
