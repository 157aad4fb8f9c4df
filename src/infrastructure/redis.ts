import { Cluster, Redis, type RedisOptions } from 'ioredis';
import { type Settings } from '../config/settings';
import { type Logger } from './logger';

/** Longest time between two attempts to reach a Redis that is down. */
const MAX_RECONNECT_MS = 1000;
/** A blocking command of BullMQ waits up to 10 s; a connection that is silent for longer than this is dead. */
const SILENCE_MS = 15_000;

/** A connection to one Redis, to the master that Sentinels name, or to a cluster. */
export type RedisConnection = Redis | Cluster;

/**
 * Opens a connection for commands that must answer soon or fail: the queue of the api, the doorbell, health. No command
 * waits for a Redis that is down, and one without an answer fails after `limitMs`.
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
 * Opens a connection that waits as long as it takes: BullMQ's own, and the subscription to the doorbell. If a command
 * has no answer for `silenceMs`, the connection is dropped and made anew: the other side may have vanished without
 * closing it.
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
    // Subscribers do it themselves whenever the connection is ready: ioredis would not report a refused subscription.
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
        // Not ioredis's failoverDetector: if it fires while a connection is being made, it ends that connection for
        // good.
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
        // ioredis would connect to the address that it has looked up, for which there is no certificate.
        ...(isSecure && { dnsLookup: (host: string, found: (error: null, host: string) => void) => found(null, host) }),
        // Not set for single nodes: commands would wait for a dead node instead of asking which node has its slots now.
        clusterRetryStrategy: reconnectAfter,
      });
    }
  }
}

function reconnectAfter(attempt: number): number {
  return Math.min(50 * attempt, MAX_RECONNECT_MS);
}

/** Whether a former master refuses to write because it is a replica now; its name leads to another master by then. */
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
