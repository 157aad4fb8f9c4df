import { accessSync, constants } from 'node:fs';
import { z } from 'zod';

/** The longest wait that Node's timers accept. */
const LONGEST_MS = 2_147_483_647;

const count = (initial: number, most: number, about: string, least = 1, what = 'a whole number') =>
  z
    .string()
    .regex(/^\d+$/, `must be ${what}`)
    .transform(Number)
    .pipe(z.number().min(least, `must be at least ${least}`).max(most, `must be at most ${most}`))
    .default(initial)
    .describe(least > 1 ? `${about} At least ${least}.` : about);

const milliseconds = (initial: number, about: string, least = 1) =>
  count(initial, LONGEST_MS, about, least, 'a whole number of milliseconds');

const url = (schemes: RegExp, names: string) =>
  z
    .string({ error: 'is required' })
    .refine((value) => schemes.test(value) && URL.canParse(value), { message: `must be a ${names} URL`, abort: true })
    .refine(isDecodable, { message: 'must have %25 where a name or password has %', abort: true });

function isDecodable(value: string): boolean {
  try {
    decodeURIComponent(value);
    return true;
  } catch {
    return false;
  }
}

/** Parameters of a Postgres URL that name files. The driver reads them when it connects. */
const CERTIFICATES = ['sslcert', 'sslkey', 'sslrootcert'];

const filesOf = (value: string): string[] =>
  CERTIFICATES.flatMap((name) => new URL(value).searchParams.get(name) || []);

function isReadable(file: string): boolean {
  try {
    accessSync(file, constants.R_OK);
    return true;
  } catch {
    return false;
  }
}

const oneOf = <const Options extends readonly [string, ...string[]]>(options: Options) =>
  z.enum(options, { error: `must be one of ${options.join(', ')}` });

/** Every environment variable that the service reads: its type, its default and what it is for. */
export const SETTINGS = {
  DATABASE_URL: url(/^postgres(ql)?:\/\//, 'postgres://')
    // Only Prisma's own tools would honour a schema; the service would not, nor a search_path.
    .refine(
      (value) => {
        const parameters = new URL(value).searchParams;
        const isOther = parameters.getAll('options').some((options) => options.includes('search_path'));
        return !isOther && ['public', null].includes(parameters.get('schema'));
      },
      { message: 'must name no schema but public' },
    )
    .refine((value) => filesOf(value).every(isReadable), {
      message: `must name files that can be read as ${CERTIFICATES.join(', ')}`,
    })
    .describe('Postgres, the truth about every job.'),
  DATABASE_POOL_SIZE: count(10, 1000, 'Connections to Postgres in each process; a worker has one more.', 2),
  REDIS_URL: z
    .string({ error: 'is required' })
    .transform((list) => list.split(',').map((one) => one.trim()))
    .pipe(
      z.array(
        url(/^rediss?:\/\/[^/]/, 'redis:// or rediss://').refine((value) => /^\/?\d*$/.test(new URL(value).pathname), {
          message: 'must name its database by a number',
        }),
      ),
    )
    .describe('Redis, for the queue and the doorbell. Several, separated by commas, with sentinels or a cluster.'),
  REDIS_MODE: oneOf(['single', 'sentinel', 'cluster'])
    .default('single')
    .describe(
      'What `REDIS_URL` names: one Redis (`single`), its sentinels (`sentinel`), or nodes of a cluster (`cluster`).',
    ),
  REDIS_SENTINEL_NAME: z
    .string()
    .min(1)
    .default('mymaster')
    .describe('The name of the master, as the sentinels know it.'),
  REDIS_SENTINEL_PASSWORD: z
    .string()
    .min(1)
    .optional()
    .describe('Password of the sentinels; the one in `REDIS_URL` is for Redis itself.'),
  QUEUE_PREFIX: z
    .string()
    .regex(/^[\w{}.-]{1,64}$/, 'must be 1 to 64 letters, digits or any of _ - . { }')
    .default('{scenario-jobs}')
    .describe('Put before every Redis key; the braces keep the keys on one node of a Redis Cluster.'),
  HOST: z
    .string()
    .min(1)
    // One of localhost's two addresses: for the other, Fastify would open a second server without our configuration.
    .transform((host) => (host === 'localhost' ? '127.0.0.1' : host))
    .default('0.0.0.0')
    .describe('Address that the processes listen on.'),
  PORT: count(3000, 65535, 'Port of the api; 0 takes any free one.', 0),
  WORKER_PORT: count(3001, 65535, "Port of a worker's health and metrics; 0 takes any free one.", 0),
  LOG_LEVEL: oneOf(['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'])
    .default('info')
    .describe('Lowest level that is logged.'),
  LOG_FORMAT: oneOf(['json', 'pretty']).default('json').describe('`pretty` is for reading in development.'),
  SCENARIO_DOMAIN: z
    .string()
    .regex(/^[a-z0-9]+((\.|-+)[a-z0-9]+)*(:\d+)?$/, 'must be a domain name')
    .default('app.exec.com')
    .describe('A scenario lives at `https://<workspace>.<this>/scenarios/<slug>`.'),

  SCENARIO_TASK: z
    .string()
    .min(1)
    .optional()
    .describe('Path of the task module that jobs run; the built-in one if not set.'),
  SCENARIO_TASK_STEP_MS: milliseconds(1000, 'How long each step of the built-in task takes.', 0),
  TASK_ENV: z
    .string()
    .regex(/^[A-Za-z_]\w*(,[A-Za-z_]\w*)*$/, 'must be variable names separated by commas')
    .transform((names) => names.split(','))
    .optional()
    .describe(
      'Further variables that a task inherits, by name, separated by commas; see docs/operations.md for the others.',
    ),
  TASK_MEMORY_MB: count(512, 1_048_576, "Limit of a task's JavaScript heap.", 16),
  TASK_TIMEOUT_MS: milliseconds(900_000, 'A run that takes longer is stopped and its job fails.'),
  WORKER_CONCURRENCY: count(4, 1000, 'Jobs that one worker runs at the same time.'),
  MAX_ATTEMPTS: count(3, 1000, 'How many runs a job may have before a retryable error, or a lost worker, fails it.'),
  RETRY_BACKOFF_MS: milliseconds(1000, 'Wait before the second run; it doubles with each further run, up to a minute.'),

  STOP_ACK_MS: milliseconds(1000, 'How long a task may take to acknowledge a request to stop.'),
  STOP_GRACE_MS: milliseconds(5000, 'How long a task that has acknowledged may clean up before SIGTERM.'),
  STOP_KILL_MS: milliseconds(2000, 'How long after SIGTERM the whole process group gets SIGKILL.'),
  CANCEL_POLL_MS: milliseconds(2000, 'How often a worker asks Postgres which of its runs were cancelled.', 50),
  BLIND_MS: milliseconds(
    60_000,
    'A worker that cannot query Postgres for this long stops its tasks. At least twice `CANCEL_POLL_MS`.',
  ),
  WATCHDOG_MS: milliseconds(10_000, 'If a worker process is frozen for this long, its watchdog kills its tasks.', 1000),
  LOCK_MS: milliseconds(
    30_000,
    'BullMQ delivers a job again when its worker has not renewed its lock for this long.',
    1000,
  ),
  WORKER_LOST_MS: milliseconds(
    90_000,
    'A worker that has given no sign of life in Postgres for this long counts as dead. More than `BLIND_MS` and `WATCHDOG_MS`.',
  ),
  RECONCILE_MS: milliseconds(
    10_000,
    'How often each worker compares rows with the queue, and repairs what differs.',
    50,
  ),
  DRAIN_MS: milliseconds(25_000, 'How long a worker that is shutting down waits for its runs before it stops them.', 0),
} as const;

export type Settings = { readonly [Name in keyof typeof SETTINGS]: z.output<(typeof SETTINGS)[Name]> };

/** Returns what is wrong, or a falsy value. */
type Rule = (settings: Partial<Settings>) => string | false | 0 | undefined;

/** The part of a Redis key that decides its cluster node: what the first braces hold, if they hold anything. */
const HASH_TAG = /^[^{]*\{[^}]+\}/;

/** Rules over several variables. */
const RULES: Rule[] = [
  ({ BLIND_MS: blind, CANCEL_POLL_MS: poll }) =>
    blind && poll && blind < 2 * poll && 'BLIND_MS must be at least twice CANCEL_POLL_MS',
  ({ REDIS_MODE: mode, REDIS_URL: urls }) =>
    mode === 'single' && urls && urls.length > 1 && 'REDIS_URL must be one URL, or REDIS_MODE sentinel or cluster',
  ({ REDIS_MODE: mode, QUEUE_PREFIX: prefix }) =>
    mode === 'cluster' && prefix && !HASH_TAG.test(prefix) && 'QUEUE_PREFIX must have a part in braces on a cluster',
  ({ WORKER_LOST_MS: lost, BLIND_MS: blind }) =>
    lost && blind && lost <= blind && 'WORKER_LOST_MS must be longer than BLIND_MS',
  ({ WORKER_LOST_MS: lost, WATCHDOG_MS: watchdog }) =>
    lost && watchdog && lost <= watchdog && 'WORKER_LOST_MS must be longer than WATCHDOG_MS',
  ({ STOP_ACK_MS: ack = 0, STOP_GRACE_MS: grace = 0, STOP_KILL_MS: kill = 0 }) =>
    ack + grace + kill > LONGEST_MS && `STOP_ACK_MS + STOP_GRACE_MS + STOP_KILL_MS must be at most ${LONGEST_MS}`,
];

/** Names every faulty variable and the rule it breaks, but never a value, which may be a secret. */
export class InvalidSettings extends Error {
  constructor(readonly faults: string[]) {
    super(`Invalid settings:\n${faults.map((fault) => `  ${fault}`).join('\n')}`);
  }
}

/** Reads the settings from an environment; an empty variable counts as not set. */
export function parseSettings(environment: NodeJS.ProcessEnv, rules: Rule[] = []): Settings {
  const faults: string[] = [];
  const settings: Record<string, unknown> = {};
  for (const [name, schema] of Object.entries(SETTINGS)) {
    const parsed = schema.safeParse(environment[name] || undefined);
    if (parsed.success) settings[name] = parsed.data;
    else faults.push(...parsed.error.issues.map((issue) => `${name} ${issue.message}`));
  }
  for (const rule of [...RULES, ...rules]) {
    const fault = rule(settings);
    if (fault) faults.push(fault);
  }
  if (faults.length > 0) throw new InvalidSettings(faults);
  return settings as Settings;
}

/**
 * Reads the settings from this process's environment, once, at start. `rules` apply to this process only. If a setting
 * is invalid, prints one message and ends the process.
 */
export function readSettings(...rules: Rule[]): Settings {
  try {
    return parseSettings(process.env, rules);
  } catch (error) {
    if (!(error instanceof InvalidSettings)) throw error;
    process.stderr.write(`${error.message}\n`);
    process.exit(78); // EX_CONFIG of sysexits.h
  }
}

/** Injection token of the settings. */
export const SETTINGS_TOKEN = Symbol('Settings');
