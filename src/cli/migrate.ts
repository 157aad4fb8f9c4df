import { hash, randomUUID } from 'node:crypto';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Client, DatabaseError } from 'pg';
import { SETTINGS } from '../config/settings';

/**
 * Applies prisma/migrations to the database that DATABASE_URL names, as `prisma migrate deploy` does, but without the
 * schema engine that Prisma downloads. It shares Prisma's bookkeeping (the table `_prisma_migrations`, its checksums,
 * its advisory lock), so either tool can carry on where the other stopped.
 */

/** The lock that Prisma's own engine takes. */
const PRISMA_LOCK = 72707369;
const MIGRATIONS = join(__dirname, '..', '..', 'prisma', 'migrations');

/**
 * How long a migration waits for a table that is in use. Meanwhile every other statement on the table queues behind the
 * migration, including those of the running service, where a request waits at most two seconds for a connection, and
 * `/readyz` one second for an answer. This is shorter than both.
 */
const LOCK_MS = 500;
/** Pause before the next try, after such a timeout or while another migration is under way. */
const PAUSE_MS = 3000;
const LOCK_TRIES = 100;
const LOCK_NOT_AVAILABLE = '55P03';

/** The table as Prisma creates it. */
const BOOKS = `CREATE TABLE IF NOT EXISTS _prisma_migrations (
  id VARCHAR(36) PRIMARY KEY NOT NULL,
  checksum VARCHAR(64) NOT NULL,
  finished_at TIMESTAMPTZ,
  migration_name VARCHAR(255) NOT NULL,
  logs TEXT,
  rolled_back_at TIMESTAMPTZ,
  started_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  applied_steps_count INTEGER NOT NULL DEFAULT 0
)`;

const HELP = `Usage: npm run migrate

Applies the migrations in prisma/migrations that the database does not have yet, each in its own transaction.
Several runs at once wait for each other. Migrations of a later version are left as they are. If a table is in use
for long, by a backup for instance, it is tried again and again, so that the service keeps running meanwhile. No wait
is longer than about five minutes. The database must exist; DATABASE_URL must name it directly, not through a pooler.

Exit codes: 0 applied or nothing to do, 1 failed, 2 wrong usage.
`;

type Applied = { migration_name: string; checksum: string; finished_at: Date | null };

async function main(args: string[]): Promise<number> {
  if (args.includes('--help') || args.includes('-h')) {
    process.stdout.write(HELP);
    return 0;
  }
  if (args.length > 0) {
    process.stderr.write(`Unknown argument: ${args[0]}\n\n${HELP}`);
    return 2;
  }
  const url = SETTINGS.DATABASE_URL.safeParse(process.env.DATABASE_URL || undefined);
  if (!url.success) {
    process.stderr.write(`DATABASE_URL ${url.error.issues[0]?.message}\n`);
    return 2;
  }
  let client: Client | undefined;
  try {
    // Throws if the URL is faulty.
    client = new Client({
      connectionString: url.data,
      connectionTimeoutMillis: 10_000,
      keepAlive: true,
      keepAliveInitialDelayMillis: 30_000,
    });
    // Losing the connection fails the current statement, or the next one; nothing more to do here.
    client.on('error', () => undefined);
    await client.connect();
    // Overrides the limits of the role: another migration, or this one, may take long. The service uses this schema.
    await client.query('SET statement_timeout = 0; SET lock_timeout = 0; SET search_path = public');
    await checkEncoding(client);
    await lockPatiently(client);
    await client.query(BOOKS);
    const { rows } = await client.query<Applied>(
      'SELECT migration_name, checksum, finished_at FROM _prisma_migrations WHERE rolled_back_at IS NULL',
    );
    const pending = findPending(rows);
    for (const migration of pending) await applyPatiently(client, migration);
    // A pooler may hand this connection on to another client, with its lock and settings.
    await client.query('SELECT pg_advisory_unlock($1)', [PRISMA_LOCK]);
    await client.query('RESET statement_timeout; RESET lock_timeout; RESET search_path');
    process.stdout.write(`${pending.length} migration(s) applied, ${rows.length} were there before\n`);
    return 0;
  } catch (error) {
    process.stderr.write(
      `Migration failed: ${error instanceof Error ? error.message || String(error) : String(error)}\n`,
    );
    return 1;
  } finally {
    await client?.end().catch(() => undefined);
  }
}

/** Any other encoding would refuse some of the texts that callers send and tasks return. */
async function checkEncoding(client: Client): Promise<void> {
  const { rows } = await client.query<{ server_encoding: string }>('SHOW server_encoding');
  const encoding = rows[0]?.server_encoding ?? '';
  if (!['UTF8', 'SQL_ASCII'].includes(encoding)) {
    throw new Error(`the encoding of the database is ${encoding}; it must be UTF8`);
  }
}

/** Waits until no other migration is under way. */
async function lockPatiently(client: Client): Promise<void> {
  for (let tries = 1; ; tries++) {
    const { rows } = await client.query<{ locked: boolean }>('SELECT pg_try_advisory_lock($1) AS locked', [
      PRISMA_LOCK,
    ]);
    if (rows[0]?.locked) return;
    const holder = await client.query<{ pid: number; application_name: string }>(
      `SELECT pid, application_name FROM pg_locks JOIN pg_stat_activity USING (pid)
       WHERE locktype = 'advisory' AND objid = $1 AND granted AND datname = current_database()`,
      [PRISMA_LOCK],
    );
    const { pid, application_name: name } = holder.rows[0] ?? {};
    const who = pid === undefined ? '' : `, on connection ${pid} ${name ? `of ${name}` : ''}`.trimEnd();
    if (tries === LOCK_TRIES) throw new Error(`another migration holds the lock for too long${who}`);
    process.stderr.write(`Another migration is under way${who}: waiting\n`);
    await sleep(PAUSE_MS);
  }
}

type Migration = { name: string; sql: string; checksum: string };

/** The migrations that are not applied yet, in their order. Throws when the database and the files disagree. */
function findPending(applied: Applied[]): Migration[] {
  const migrations = readdirSync(MIGRATIONS, { withFileTypes: true })
    .filter((entry) => entry.isDirectory())
    .map(({ name }) => {
      const sql = readFileSync(join(MIGRATIONS, name, 'migration.sql'), 'utf8');
      return { name, sql, checksum: hash('sha256', sql) };
    })
    .sort((one, other) => (one.name < other.name ? -1 : 1));
  for (const { migration_name: name, checksum, finished_at: finishedAt } of applied) {
    const file = migrations.find((migration) => migration.name === name);
    if (!finishedAt) throw new Error(`${name} was begun and not finished; see \`prisma migrate resolve\``);
    if (!file && name > (migrations.at(-1)?.name ?? '')) {
      // As Prisma does: a version must be able to run beside the next one, and to be rolled back to.
      process.stderr.write(`${name} is of a later version\n`);
      continue;
    }
    if (!file) throw new Error(`${name} is applied but not among the files`);
    if (file.checksum !== checksum) throw new Error(`${name} was changed after it was applied`);
  }
  return migrations.filter(({ name }) => !applied.some((row) => row.migration_name === name));
}

async function applyPatiently(client: Client, migration: Migration): Promise<void> {
  for (let tries = 1; ; tries++) {
    try {
      return await apply(client, migration);
    } catch (error) {
      const isLocked = error instanceof DatabaseError && error.code === LOCK_NOT_AVAILABLE;
      if (!isLocked || tries === LOCK_TRIES) {
        throw new Error(`${migration.name}: ${error instanceof Error ? error.message : String(error)}`, {
          cause: error,
        });
      }
      process.stderr.write(`${migration.name} waits: somebody else uses a table that it changes\n`);
      await sleep(PAUSE_MS);
    }
  }
}

async function apply(client: Client, { name, sql, checksum }: Migration): Promise<void> {
  await client.query('BEGIN');
  try {
    await client.query(`SET LOCAL lock_timeout = ${LOCK_MS}`);
    await client.query(sql);
    await client.query(
      `INSERT INTO _prisma_migrations (id, checksum, finished_at, migration_name, applied_steps_count)
       VALUES ($1, $2, now(), $3, 1)`,
      [randomUUID(), checksum, name],
    );
    await client.query('COMMIT');
  } catch (error) {
    // If the connection is lost, there is nothing to roll back.
    await client.query('ROLLBACK').catch(() => undefined);
    throw error;
  }
  process.stdout.write(`applied ${name}\n`);
}

void main(process.argv.slice(2)).then((code) => (process.exitCode = code));
