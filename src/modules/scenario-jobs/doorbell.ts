import { Cluster } from 'ioredis';
import { type Settings } from '../../config/settings';
import { type RedisConnection } from '../../infrastructure/redis';

/**
 * The doorbell: a message to the one worker that runs a cancelled job. Losing it delays the stop by at most one poll.
 * On a cluster it is a sharded message, which goes to one node and not to all.
 *
 * `stopToken` proves that the cancel is committed: the worker generated it for this run, and in this code only a cancel
 * reads it from the row. Without it, as from an api of an earlier version, the message has no authority and the worker
 * asks Postgres.
 */
export type CancelMessage = {
  runId: string;
  stopToken: string | null;
  /** Milliseconds since 1970, by the clock of Postgres. */
  cancelledAt: number;
};

/** The pub/sub channel of one worker. */
export function cancelChannel(settings: Pick<Settings, 'QUEUE_PREFIX'>, workerId: string): string {
  return `${settings.QUEUE_PREFIX}:cancel:${workerId}`;
}

/** Rings a doorbell; returns how many connections heard it. */
export async function ring(redis: RedisConnection, channel: string, message: CancelMessage): Promise<number> {
  const text = JSON.stringify(message);
  return Number(await (redis instanceof Cluster ? redis.spublish(channel, text) : redis.publish(channel, text)));
}

/** Longer than any message of ours. */
const MAX_MESSAGE = 1000;

/**
 * The run that a message says was cancelled, the proof and the time; undefined if the message is not one of ours.
 * Anybody may send one.
 */
export function parseMessage(text: string): { runId: string; stopToken: string; cancelledAt: number } | undefined {
  if (text.length > MAX_MESSAGE) return undefined;
  try {
    const { runId, stopToken, cancelledAt } = JSON.parse(text) as Record<string, unknown>;
    if (typeof runId !== 'string' || typeof stopToken !== 'string') return undefined;
    return Number.isFinite(cancelledAt) ? { runId, stopToken, cancelledAt: Number(cancelledAt) } : undefined;
  } catch {
    return undefined;
  }
}

/** Subscribes once; must be called again whenever the connection is made anew. */
export async function listenAt(redis: RedisConnection, channel: string): Promise<void> {
  await (redis instanceof Cluster ? redis.ssubscribe(channel) : redis.subscribe(channel));
}
