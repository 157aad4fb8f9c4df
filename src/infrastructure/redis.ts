import { Cluster, Redis, type RedisOptions } from 'ioredis';
import { type Settings } from '../config/settings';
import { type Logger } from './logger';

/** Longest time between two attempts to reach a Redis that is down. */
const MAX_RECONNECT_MS = 1000;
/** A blocking command of BullMQ waits for up to 10 s; a connection on which nothing comes for longer is dead. */
const SILENCE_MS = 15_000;

/** A connection to one Redis, to the master that Sentinels name, or to a cluster. */
export type RedisConnection = Redis | Cluster;

/**
 * A connection for commands that must answer soon or fail: the queue of the api, the doorbell, health.
 * Nothing waits for a Redis that is down, and a command without an answer is given up after `limitMs`.
 */
export function connectImpatiently(settings: Settings, logger: Logger, limitMs: number): RedisConnection {
  const options = {
    enableOfflineQueue: false,
    maxRetriesPerRequest: 0,
    commandTimeout: limitMs,
    connectTimeout: limitMs,
    socketTimeout: 2 * limitMs,
  };
  return logged(connect(settings, options), logger, 'commands');
}

/**
 * A connection that waits as long as it takes: BullMQ's own, and the subscription to the doorbell. One on which a
 * command has no answer for `silenceMs` is given up and made anew: the other side may be gone without a word.
 */
export function connectPatiently(
  settings: Settings,
  logger: Logger,
  purpose: string,
  { silenceMs = SILENCE_MS, sharded = false } = {},
): RedisConnection {
  const options = {
    maxRetriesPerRequest: null,
    connectTimeout: 2000,
    socketTimeout: silenceMs,
    // Subscribers do it themselves whenever the connection is ready: ioredis would tell nobody that it was refused.
    autoResubscribe: false,
  };
  return logged(connect(settings, options, sharded), logger, purpose);
}

function connect(settings: Settings, options: RedisOptions, shardedSubscribers = false): RedisConnection {
  const [first, ...others] = settings.REDIS_URL.map((url) => new URL(url)) as [URL, ...URL[]];
  const isSecure = first.protocol === 'rediss:';
  const access = {
    username: decodeURIComponent(first.username),
    password: decodeURIComponent(first.password),
    ...(isSecure && { tls: {} }),
    ...options,
  };
  const nodes = [first, ...others].map(({ hostname, port }) => ({
    host: hostname.replace(/^\[|\]$/g, ''),
    ...(port && { port: Number(port) }),
  }));
  switch (settings.REDIS_MODE) {
    case 'single':
      return new Redis(first.href, { ...options, retryStrategy: reconnectAfter, reconnectOnError: isDemoted });
    case 'sentinel':
      return new Redis({
        ...access,
        db: Number(first.pathname.slice(1)),
        sentinels: nodes,
        name: settings.REDIS_SENTINEL_NAME,
        sentinelPassword: settings.REDIS_SENTINEL_PASSWORD,
        enableTLSForSentinelMode: isSecure,
        ...(isSecure && { sentinelTLS: {} }),
        // Not ioredis's failoverDetector: one that fires while a connection is being made ends it for good.
        sentinelRetryStrategy: reconnectAfter,
        retryStrategy: reconnectAfter,
        reconnectOnError: isDemoted,
      });
    case 'cluster': {
      const { enableOfflineQueue = true, ...redisOptions } = access;
      return new Cluster(nodes, {
        enableOfflineQueue,
        redisOptions,
        shardedSubscribers,
        // It would connect to the address that it has looked up, for which there is no certificate.
        ...(isSecure && { dnsLookup: (host: string, found: (error: null, host: string) => void) => found(null, host) }),
        // Not for its nodes: commands would wait for a dead one instead of asking who has its slots by now.
        clusterRetryStrategy: reconnectAfter,
      });
    }
  }
}

function reconnectAfter(attempt: number): number {
  return Math.min(50 * attempt, MAX_RECONNECT_MS);
}

/** A master that has become a replica refuses to write: the name leads to another one by now. */
function isDemoted(error: Error): boolean {
  return error.message.startsWith('READONLY');
}

/** Logs the loss and the return of the connection once each, not every attempt in between. */
function logged(redis: RedisConnection, logger: Logger, purpose: string): RedisConnection {
  let lost = false;
  redis.on('error', (error: unknown) => {
    if (!lost) logger.warn({ err: error, purpose }, 'redis connection lost');
    lost = true;
  });
  redis.on('ready', () => {
    if (lost) logger.info({ purpose }, 'redis connection is back');
    lost = false;
  });
  return redis;
}
