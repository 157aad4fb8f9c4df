// Cancelling with BullMQ's own means: a worker whose processor runs in the worker's process and heeds the signal of
// `worker.cancelJob`. The message to cancel comes over Redis's publish/subscribe or over BullMQ's Relay.
import { randomUUID } from 'node:crypto';
import { Queue, Relay, Worker } from 'bullmq';
import { Redis } from 'ioredis';
import { serve } from './helper.mjs';

const { REDIS_URL, QUEUE_PREFIX } = process.env;
const connect = () => new Redis(REDIS_URL, { maxRetriesPerRequest: null });
const runs = new Map();
const queue = new Queue('in-process', { connection: connect(), prefix: QUEUE_PREFIX });
const worker = new Worker('in-process', runJob, { connection: connect(), prefix: QUEUE_PREFIX, concurrency: 4 });
for (const one of [queue, worker]) one.on('error', () => undefined);

/** Three parameters: BullMQ makes a signal only for a processor that declares it. */
async function runJob({ id, data }, token, signal) {
  const run = runs.get(id);
  run.began();
  if (data.spinMs) {
    const until = performance.now() + data.spinMs;
    while (performance.now() < until);
  } else {
    await new Promise((resolve) => signal.addEventListener('abort', resolve));
  }
  // A string, because a BigInt cannot be sent as JSON.
  run.ended({ at: String(process.hrtime.bigint()), aborted: signal.aborted });
}

async function listen() {
  const subscriber = connect();
  subscriber.on('message', (_, jobId) => worker.cancelJob(jobId));
  await subscriber.subscribe(`${QUEUE_PREFIX}:cancel`);
  const relay = new Relay({ connection: connect(), prefix: QUEUE_PREFIX });
  relay.on('error', () => undefined);
  await relay.subscribe('cancel', ({ data }) => worker.cancelJob(data));
}

/** Starts a job and answers once its code runs. */
async function start({ spinMs }) {
  const id = `job-${randomUUID()}`;
  const run = {};
  const begun = new Promise((resolve) => (run.began = resolve));
  run.end = new Promise((resolve) => (run.ended = resolve));
  runs.set(id, run);
  await queue.add('run', { spinMs }, { jobId: id });
  await begun;
  return id;
}

serve({ listen, start, end: (id) => runs.get(id).end });
