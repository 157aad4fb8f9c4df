import { parseArgs } from 'node:util';
import { ApiKeyRepository, type ListedKey } from '../auth/api-key.repository';
import { SETTINGS } from '../config/settings';
import { Database } from '../infrastructure/database';
import { isDatabaseUnavailable, isNotMigrated } from '../infrastructure/database-errors';
import { createLogger } from '../infrastructure/logger';

const HELP = `Usage: npm run -s api-key -- <command> [options]
       node dist/cli/api-key.js <command> [options]     in the image

Commands
  create --workspace <slug> --name <name> [--expires <time>]
                          Creates a key and prints it; it is never shown again.
                          Creates the workspace if it does not exist.
  list [--workspace <slug>]
                          Lists keys: id, workspace, name, state, times. Never the keys themselves.
  revoke <key-id>         Revokes a key at once.
  rotate <key-id> [--overlap <time>] [--expires <time>]
                          Creates a key to replace this one and prints it. The old key stops working at once, or
                          after the overlap. The new one expires when the old one would have, or after --expires.

A time is a number and a unit: 30m, 12h, 90d. DATABASE_URL names the database.
On standard output, create and rotate print the key and nothing else; messages go to standard error.

Exit codes: 0 done, 1 failed, 2 wrong usage.
`;

const UNITS: Record<string, number> = { m: 60_000, h: 3_600_000, d: 86_400_000 };
const SLUG = /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/;

class WrongUsage extends Error {}
class Failed extends Error {}

type Options = { workspace?: string; name?: string; expires?: string; overlap?: string };
type Command = {
  options: (keyof Options)[];
  takesId: boolean;
  run: (keys: ApiKeyRepository, given: Options, id: string) => Promise<void>;
};

const COMMANDS: Record<string, Command> = {
  create: {
    options: ['workspace', 'name', 'expires'],
    takesId: false,
    async run(keys, { workspace, name, expires }) {
      if (workspace === undefined) throw new WrongUsage('--workspace is required');
      checkSlug(workspace);
      const { id, key } = await keys.create(
        workspace,
        checkName(name),
        expires === undefined ? null : await after(keys, expires, '--expires'),
      );
      note(`Key ${id} of workspace ${workspace}:`);
      printKey(id, key);
    },
  },
  list: {
    options: ['workspace'],
    takesId: false,
    async run(keys, { workspace }) {
      if (workspace !== undefined) checkSlug(workspace);
      const listed = await keys.list(workspace);
      if (listed.length === 0) return note('No keys');
      const now = await keys.now();
      for (const key of listed) {
        const times = [
          ['created', key.createdAt],
          ['expires', key.expiresAt],
          ['revoked', key.revokedAt],
          ['rotated', key.rotatedAt],
        ] as const;
        const shown = times.flatMap(([what, time]) => (time ? [`${what} ${time.toISOString()}`] : []));
        print([key.id, key.workspace.slug, key.name, stateOf(key, now), ...shown].join('\t'));
      }
    },
  },
  revoke: {
    options: [],
    takesId: true,
    async run(keys, _options, id) {
      if (!(await keys.revoke(id))) throw new Failed(`There is no key ${id}, or it is revoked already`);
      note(`Key ${id} is revoked`);
    },
  },
  rotate: {
    options: ['overlap', 'expires'],
    takesId: true,
    async run(keys, { overlap, expires }, id) {
      const created = await keys.rotate(
        id,
        overlap === undefined ? await keys.now() : await after(keys, overlap, '--overlap'),
        expires === undefined ? undefined : await after(keys, expires, '--expires'),
      );
      if (!created) throw new Failed(`There is no key ${id}, or it is revoked, expired or rotated already`);
      const until = created.expiresAt ? ` until ${created.expiresAt.toISOString()}` : '';
      note(`Key ${created.id} takes the place of ${id}${until}:`);
      printKey(created.id, created.key);
    },
  },
};

async function main(args: string[]): Promise<number> {
  try {
    const { values, positionals } = parse(args);
    if (values.help) {
      print(HELP.trimEnd());
      return 0;
    }
    const [name, id, ...rest] = positionals;
    const command = name !== undefined && Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
    if (!command) throw new WrongUsage(name === undefined ? 'A command is required' : `Unknown command: ${name}`);
    const surplus = command.takesId ? rest[0] : id;
    if (surplus !== undefined) throw new WrongUsage(`Unknown argument: ${surplus}`);
    if (command.takesId && id === undefined) throw new WrongUsage(`${name} needs the id of a key; \`list\` shows them`);
    for (const option of Object.keys(values)) {
      if (!command.options.includes(option as keyof Options)) throw new WrongUsage(`${name} has no option --${option}`);
    }
    await withKeys((keys) => command.run(keys, values, id ?? ''));
    return 0;
  } catch (error) {
    if (error instanceof WrongUsage) {
      note(`${error.message}; see --help`);
      return 2;
    }
    if (error instanceof Failed) note(error.message);
    else if (isNotMigrated(error)) note('The database has not been migrated: run npm run migrate');
    else if (isDatabaseUnavailable(error))
      note(`Postgres cannot be reached, or refuses the log-in; DATABASE_URL names both\n${lastLine(error)}`);
    else note(`Failed: ${error instanceof Error ? error.message : String(error)}`);
    return 1;
  }
}

function parse(args: string[]) {
  const text = { type: 'string' } as const;
  try {
    return parseArgs({
      args,
      allowPositionals: true,
      options: { workspace: text, name: text, expires: text, overlap: text, help: { type: 'boolean', short: 'h' } },
    });
  } catch (error) {
    throw new WrongUsage(error instanceof Error ? error.message : String(error));
  }
}

/** Prisma's own message, which follows the statement that it quotes. */
function lastLine(error: unknown): string {
  return String(error).trim().split('\n').at(-1) ?? '';
}

async function withKeys(work: (keys: ApiKeyRepository) => Promise<void>): Promise<void> {
  const url = SETTINGS.DATABASE_URL.safeParse(process.env.DATABASE_URL || undefined);
  if (!url.success) throw new WrongUsage(`DATABASE_URL ${url.error.issues[0]?.message}`);
  const logger = createLogger('api-key', { LOG_LEVEL: 'silent', LOG_FORMAT: 'json' });
  const database = new Database({ DATABASE_URL: url.data, DATABASE_POOL_SIZE: 2 }, logger);
  try {
    await work(new ApiKeyRepository(database));
  } finally {
    await database.$disconnect();
  }
}

function checkSlug(slug: string): void {
  if (!SLUG.test(slug)) {
    throw new WrongUsage('--workspace must be 1 to 63 of a-z, 0-9 and -, and neither begin nor end with -');
  }
}

function checkName(name: string | undefined): string {
  if (name === undefined) throw new WrongUsage('--name is required');
  if (!/^[^\p{Control}]{1,100}$/u.test(name)) throw new WrongUsage('--name must be 1 to 100 printable characters');
  return name;
}

/** The moment this long from now, by the clock of Postgres, which decides when a key expires. */
async function after(keys: ApiKeyRepository, time: string, option: string): Promise<Date> {
  const [, number, unit] = /^(\d{1,6})([mhd])$/.exec(time) ?? [];
  if (!number || !unit || Number(number) === 0)
    throw new WrongUsage(`${option} must be a number and a unit, like 30m, 12h or 90d`);
  return new Date(Number(await keys.now()) + Number(number) * (UNITS[unit] ?? 0));
}

function stateOf({ revokedAt, expiresAt, workspace }: ListedKey, now: Date) {
  if (revokedAt) return 'revoked';
  if (expiresAt && expiresAt <= now) return 'expired';
  return workspace.active ? 'active' : 'workspace inactive';
}

let printedKeyId: string | undefined;
function printKey(id: string, key: string): void {
  printedKeyId = id;
  print(key);
}

const print = (line: string) => void process.stdout.write(`${line}\n`);
const note = (line: string) => void process.stderr.write(`${line}\n`);

process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  // Whoever reads a list may stop early, as `head` does; but a key that was not shown is lost.
  if (error.code === 'EPIPE' && !printedKeyId) process.exit(0);
  note(`Failed: ${error.message}${printedKeyId ? `; nobody has seen the key, so revoke ${printedKeyId}` : ''}`);
  process.exit(1);
});
void main(process.argv.slice(2)).then((code) => (process.exitCode = code));
