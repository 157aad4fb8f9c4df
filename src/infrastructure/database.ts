import { hash } from 'node:crypto';
import { Inject, Injectable, type OnApplicationShutdown, type OnModuleInit } from '@nestjs/common';
import { PrismaPg } from '@prisma/adapter-pg';
import { Pool } from 'pg';
import { SETTINGS_TOKEN, type Settings } from '../config/settings';
import { PrismaClient } from '../generated/prisma/client';
import { LOGGER, type Logger } from './logger';
import { within } from './within';

/** A statement is given up by Postgres after this long. */
const STATEMENT_TIMEOUT_MS = 4000;
/** Wait for an answer no longer than this: the server itself may have gone silent. */
const QUERY_TIMEOUT_MS = 5000;
/** Wait for a connection, a new one or one of the pool, no longer than this. */
const CONNECT_TIMEOUT_MS = 2000;
/** An unused connection is probed this often: firewalls forget one after some minutes of silence. */
const KEEP_ALIVE_MS = 30_000;
const DISCONNECT_TIMEOUT_MS = 1000;
/** So long after it was sent the last statement to a Postgres that is silent has failed. */
export const LONGEST_STATEMENT_MS = CONNECT_TIMEOUT_MS + QUERY_TIMEOUT_MS;

/**
 * How many connections stay open while nobody asks: as many as decide cancels at once. The others are closed after ten
 * seconds without use. A new one costs several round trips, and the parsing of each statement.
 */
const IDLE_CONNECTIONS = 2;

/**
 * Prisma's adapter takes every time for UTC, in ISO's style, whatever the server says: with another `TimeZone`, which a
 * database or a role may have, jobs had the wrong times and keys lived for hours more or less.
 */
const SESSION = '-c TimeZone=UTC -c DateStyle=ISO';

/** The URL with these options of a session after its own: the last of two in a URL counts. */
function withSession(url: string): string {
  const own = new URL(url).searchParams.get('options') ?? '';
  return `${url}${url.includes('?') ? '&' : '?'}options=${encodeURIComponent(`${own} ${SESSION}`.trim())}`;
}

/** Far more than there are statements in the code; one that is made up at run time would never come again. */
const MAX_NAMED_STATEMENTS = 200;

/** Names each statement by its text, so that a connection parses it once. */
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

function poolOf(settings: Pick<Settings, 'DATABASE_URL' | 'DATABASE_POOL_SIZE'>): Pool {
  const pool = new Pool({
    connectionString: withSession(settings.DATABASE_URL),
    max: settings.DATABASE_POOL_SIZE,
    min: IDLE_CONNECTIONS,
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    statement_timeout: STATEMENT_TIMEOUT_MS,
    query_timeout: QUERY_TIMEOUT_MS,
    keepAlive: true,
    keepAliveInitialDelayMillis: KEEP_ALIVE_MS,
    application_name: `scenario-jobs ${process.pid}`,
  });
  // The pool no longer listens to a new connection that it hands out, and Prisma not until some turns later: an error
  // that comes right behind the greeting would be heard by nobody, and end the process.
  pool.on('connect', (client) => client.on('error', () => undefined));
  // Prisma gives a connection back although it has got no answer to its ROLLBACK. Whatever came next on that
  // connection would be part of the transaction, succeed, and never be committed.
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
      // Prisma would note for each statement where it was called, and read the source file of one that fails.
      errorFormat: 'minimal',
      adapter: new PrismaPg(poolOf(settings), {
        statementNameGenerator: statementNames(),
        onPoolError: (error) => logger.warn({ err: error }, 'postgres connection lost'),
        disposeExternalPool: true,
      }),
    });
  }

  async onModuleInit() {
    // The first statement of a process takes so long that a probe would take Postgres for gone; and in a burst of first
    // requests, a connection that is still to be made.
    const pings = Promise.all(Array.from({ length: IDLE_CONNECTIONS }, () => this.ping()));
    await within(CONNECT_TIMEOUT_MS, 'first statement', pings).catch(() => undefined);
  }

  async onApplicationShutdown() {
    // A statement that is still under way has nobody left who waits for it.
    await within(DISCONNECT_TIMEOUT_MS, 'disconnecting', this.$disconnect()).catch(() => undefined);
  }

  /**
   * Resolves when Postgres answers and has been migrated, else throws. It names what the newest migration has added.
   */
  async ping(): Promise<void> {
    await this.$queryRaw`SELECT stop_token FROM scenario_jobs LIMIT 0`;
  }
}
