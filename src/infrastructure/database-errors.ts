/** Prisma's codes for a database that cannot be reached, is closed, is out of connections or takes too long. */
const PRISMA_CODES = new Set(['P1001', 'P1002', 'P1008', 'P1017', 'P2024', 'P2028', 'P2037']);
/**
 * SQLSTATE classes for: connection, login, no such database, rollback (deadlock, serialization), resources, operator
 * intervention, system. Also a standby that refuses to write, `lock_timeout`, errors inside Postgres itself, and a
 * pooler that does not know prepared statements.
 */
const SQLSTATES = /^(08|28|3D|40|53|57|58)[0-9A-Z]{3}$|^25006$|^55P03$|^XX000$|^42P05$|^26000$/;
/**
 * Messages of the driver for errors without a code: a connection ended or an answer did not come. Also for a connection
 * that could not be made, whatever the reason: some of those codes, such as ENOENT, can also come from a file.
 */
const MESSAGES =
  /connect E[A-Z]+|Connection terminated|timeout exceeded when trying to connect|Query read timeout|Client has encountered a connection error|Connection ended/;
const SOCKET_CODES = new Set([
  'ECONNREFUSED',
  'ECONNRESET',
  'ETIMEDOUT',
  'ENOTFOUND',
  'EAI_AGAIN',
  'EPIPE',
  'EMFILE',
  'ENFILE',
  'EHOSTUNREACH',
  'EHOSTDOWN',
  'ENETUNREACH',
  'ENETDOWN',
  'EADDRNOTAVAIL',
]);
const ADAPTER_KINDS = new Set([
  'DatabaseNotReachable',
  'ConnectionClosed',
  'SocketTimeout',
  'TooManyConnections',
  'TlsConnectionError',
]);

/** A table or a column does not exist: Prisma's codes, and those of Postgres. */
const NOT_MIGRATED = new Set(['P2021', 'P2022', '42P01', '42703']);

/**
 * Whether an error means that Postgres could not do the work just now, through no fault of the statement; also because
 * it has still to be migrated. Prisma wraps the driver's error in its own, so the whole chain is searched.
 */
export function isDatabaseUnavailable(error: unknown): boolean {
  if (isNotMigrated(error)) return true;
  return chain(error).some(
    ({ code, originalCode, kind, message, severity }) =>
      // Postgres ended the connection, or refused it.
      severity === 'FATAL' ||
      severity === 'PANIC' ||
      PRISMA_CODES.has(String(code)) ||
      SOCKET_CODES.has(String(code)) ||
      SQLSTATES.test(String(originalCode ?? code)) ||
      ADAPTER_KINDS.has(String(kind)) ||
      MESSAGES.test(String(message)),
  );
}

/** Whether an error means that the database has not been migrated, or not by the newest migration. */
export function isNotMigrated(error: unknown): boolean {
  return chain(error).some(({ code, originalCode }) => NOT_MIGRATED.has(String(originalCode ?? code)));
}

/** Whether an error is a unique violation of the index of this name. */
export function isUniqueViolation(error: unknown, index: string): boolean {
  const links = chain(error);
  return (
    links.some(
      ({ code, kind, originalCode }) =>
        originalCode === '23505' || code === '23505' || kind === 'UniqueConstraintViolation',
    ) && links.some((link) => JSON.stringify(link.constraint ?? link.message ?? '').includes(index))
  );
}

type Link = Record<'code' | 'originalCode' | 'kind' | 'message' | 'severity' | 'constraint', unknown>;

function chain(error: unknown): Link[] {
  const links: Link[] = [];
  const queue = [error];
  while (queue.length > 0 && links.length < 10) {
    const link = queue.shift();
    if (typeof link !== 'object' || link === null) continue;
    links.push(link as Link);
    const { cause, meta } = link as { cause?: unknown; meta?: { driverAdapterError?: unknown } };
    queue.push(cause, meta?.driverAdapterError);
  }
  return links;
}
