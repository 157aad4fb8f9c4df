import { Redis } from 'ioredis';
import { type Settings } from '../config/settings';
import { type Logger } from './logger';

/** Longest time between two attempts to reach a Redis that is down. */
const MAX_RECONNECT_MS = 1000;

/**
 * A connection for commands that must answer soon or fail: the queue of the api, the doorbell, health.
 * Nothing waits for a Redis that is down, and a command without an answer is given up after `limitMs`.
 */
export function connectImpatiently(settings: Settings, logger: Logger, limitMs: number): Redis {
  return logged(
    new Redis(settings.REDIS_URL, {
      enableOfflineQueue: false,
      maxRetriesPerRequest: 0,
      commandTimeout: limitMs,
      connectTimeout: limitMs,
      socketTimeout: 2 * limitMs,
      retryStrategy: reconnectAfter,
    }),
    logger,
    'commands',
  );
}

/** A connection that waits as long as it takes: BullMQ's own, and the subscription to the doorbell. */
export function connectPatiently(settings: Settings, logger: Logger, purpose: string): Redis {
  return logged(
    new Redis(settings.REDIS_URL, { maxRetriesPerRequest: null, connectTimeout: 2000, retryStrategy: reconnectAfter }),
    logger,
    purpose,
  );
}

function reconnectAfter(attempt: number): number {
  return Math.min(50 * attempt, MAX_RECONNECT_MS);
}

/** Logs the loss and the return of the connection once each, not every attempt in between. */
function logged(redis: Redis, logger: Logger, purpose: string): Redis {
  let lost = false;
  redis.on('error', (error) => {
    if (!lost) logger.warn({ err: error, purpose }, 'redis connection lost');
    lost = true;
  });
  redis.on('ready', () => {
    if (lost) logger.info({ purpose }, 'redis connection is back');
    lost = false;
  });
  return redis;
}
