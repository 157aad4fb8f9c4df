// BullMQ's `queue.remove` alone, in process: from a list and from a sorted set, at several depths.
import { Queue } from 'bullmq';
import { Redis } from 'ioredis';
import { serve } from '../helper.mjs';
import { runAll } from '../loop.mjs';
import { addEntries, newIds } from '../site.mjs';

const connection = new Redis(process.env.REDIS_URL, { maxRetriesPerRequest: null });
const queues = new Map();
/** Without a priority BullMQ keeps a job in a list. */
const OPTIONS = { list: {}, prioritized: { priority: 1 } };

async function open({ name, kind, depth }) {
  const queue = new Queue(name, { connection, prefix: '{bench-peers}' });
  const ids = newIds(depth);
  await addEntries(queue, ids, OPTIONS[kind]);
  queues.set(name, { queue, kind, ids });
}

/** Removes entries at random places of the queue, then adds as many again, so that its depth stays the same. */
async function cancel({ name, count, concurrency }) {
  const { queue, kind, ids } = queues.get(name);
  const targets = [];
  while (targets.length < count) {
    const place = Math.floor(Math.random() * ids.length);
    targets.push(ids[place]);
    ids[place] = ids.at(-1);
    ids.pop();
  }
  const removed = [];
  const measured = await runAll(targets, concurrency, async (id) => removed.push(await queue.remove(id)));
  if (removed.some((one) => one !== 1)) throw new Error('an entry could not be removed');
  const more = newIds(count);
  await addEntries(queue, more, OPTIONS[kind]);
  ids.push(...more);
  return measured;
}

serve({ open, cancel });
