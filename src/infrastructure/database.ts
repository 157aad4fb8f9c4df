import { hash } from 'node:crypto';
import { Inject, Injectable, type OnApplicationShutdown, type OnModuleInit } from '@nestjs/common';
import { PrismaPg } from '@prisma/adapter-pg';
import { Client, type ClientConfig, Pool } from 'pg';
import { parse } from 'pg-connection-string';
import { SETTINGS_TOKEN, type Settings } from '../config/settings';
import { PrismaClient } from '../generated/prisma/client';
import { LOGGER, type Logger } from './logger';
import { within } from './within';

/** Postgres gives up on a statement after this long. */
const STATEMENT_TIMEOUT_MS = 4000;
/** How long to wait for an answer: the server itself may have gone silent. */
const QUERY_TIMEOUT_MS = 5000;
/** How long to wait for a connection, new or from the pool. */
const CONNECT_TIMEOUT_MS = 2000;
/** How often an idle connection is probed: firewalls forget a connection after some minutes of silence. */
const KEEP_ALIVE_MS = 30_000;
const DISCONNECT_TIMEOUT_MS = 1000;
/** A statement sent to a silent Postgres has failed after this long at the latest. */
export const LONGEST_STATEMENT_MS = CONNECT_TIMEOUT_MS + QUERY_TIMEOUT_MS;

/**
 * How many connections stay open when idle: as many as are used at once to decide cancels. The others are closed after
 * ten seconds without use. A new connection costs several round trips, and must parse each statement again.
 */
const IDLE_CONNECTIONS = 2;

/**
 * What a database or a role may have set otherwise. Prisma's adapter reads every time as UTC in ISO style, whatever the
 * server says: jobs would get wrong times and keys live hours too long or too short. And Prisma's models are always in
 * the schema `public`, where raw statements must find their tables as well.
 */
const SESSION = '-c TimeZone=UTC -c DateStyle=ISO -c search_path=public';

/** The URL with these session options added to its own. If a URL has `options` twice, the last one counts. */
function withSession(url: string): string {
  const own = new URL(url).searchParams.get('options') ?? '';
  return `${url}${url.includes('?') ? '&' : '?'}options=${encodeURIComponent(`${own} ${SESSION}`.trim())}`;
}

/** Far more than the code has statements; one composed at run time would never be used again. */
const MAX_NAMED_STATEMENTS = 200;

/** Names each statement by a hash of its text, so that a connection parses it only once. */
function statementNames(): (query: { sql: string }) => string {
  const names = new Map<string, string>();
  return ({ sql }) => {
    const known = names.get(sql);
    if (known !== undefined) return known;
    if (names.size >= MAX_NAMED_STATEMENTS) return '';
    const name = hash('sha256', sql, 'base64url');
    names.set(sql, name);
    return name;
  };
}

/**
 * The class of connections with this URL. Each new one reads the files that the URL names, so that a renewed certificate
 * needs no restart. If one cannot be opened, because it is just being replaced or file descriptors are short, what was
 * read last still counts; pg itself would throw where nobody could catch it, and end the process.
 */
export function connectionsWith(url: string, logger: Logger): typeof Client {
  const read = () => parse(url) as ClientConfig;
  let config = read();
  return class extends Client {
    constructor(options: ClientConfig) {
      try {
        config = read();
      } catch (error) {
        logger.warn(
          { err: error },
          'a certificate file of DATABASE_URL cannot be read; what it held before still counts',
        );
      }
      super({ ...options, ...config });
    }
  };
}

function poolOf(settings: Pick<Settings, 'DATABASE_URL' | 'DATABASE_POOL_SIZE'>, logger: Logger): Pool {
  const pool = new Pool({
    Client: connectionsWith(withSession(settings.DATABASE_URL), logger),
    max: settings.DATABASE_POOL_SIZE,
    min: IDLE_CONNECTIONS,
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    statement_timeout: STATEMENT_TIMEOUT_MS,
    query_timeout: QUERY_TIMEOUT_MS,
    keepAlive: true,
    keepAliveInitialDelayMillis: KEEP_ALIVE_MS,
    application_name: `scenario-jobs ${process.pid}`,
  });
  // The pool stops listening to a new connection when it hands it out, and Prisma begins some turns of the event loop
  // later: an error that comes right behind the greeting would have no listener, and end the process.
  pool.on('connect', (client) => client.on('error', () => undefined));
  // Prisma returns a connection to the pool even if its ROLLBACK got no answer. Whatever came next on that connection
  // would become part of the transaction, succeed, and never be committed.
  pool.on('release', (_error, client) => {
    if (client.getTransactionStatus() !== 'I') void client.end();
  });
  return pool;
}

/** Prisma over a pool of Postgres connections in which nothing waits without a limit. */
@Injectable()
export class Database extends PrismaClient implements OnModuleInit, OnApplicationShutdown {
  constructor(
    @Inject(SETTINGS_TOKEN) settings: Pick<Settings, 'DATABASE_URL' | 'DATABASE_POOL_SIZE'>,
    @Inject(LOGGER) logger: Logger,
  ) {
    super({
      // By default Prisma records where each statement was called, and reads the source file of one that fails.
      errorFormat: 'minimal',
      adapter: new PrismaPg(poolOf(settings, logger), {
        statementNameGenerator: statementNames(),
        onPoolError: (error) => logger.warn({ err: error }, 'postgres connection lost'),
        disposeExternalPool: true,
      }),
    });
  }

  async onModuleInit() {
    // The first statement of a process takes so long that a probe would take Postgres for gone; in a burst of first
    // requests, so does a connection that must still be made.
    const pings = Promise.all(Array.from({ length: IDLE_CONNECTIONS }, () => this.ping()));
    await within(CONNECT_TIMEOUT_MS, 'first statement', pings).catch(() => undefined);
  }

  async onApplicationShutdown() {
    // Nobody waits any more for a statement that is still under way.
    await within(DISCONNECT_TIMEOUT_MS, 'disconnecting', this.$disconnect()).catch(() => undefined);
  }

  /**
   * Resolves if Postgres answers and has been migrated, else throws. The query names what the newest migration added.
   */
  async ping(): Promise<void> {
    await this.$queryRaw`SELECT stop_token FROM scenario_jobs LIMIT 0`;
  }
}
