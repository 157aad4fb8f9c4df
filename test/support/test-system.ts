import { randomBytes, randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Redis } from 'ioredis';
import { Client, Pool } from 'pg';
import { hashApiKey, newApiKey } from '../../src/auth/api-key';
import { newId } from '../../src/infrastructure/ids';
import { livingMembers } from '../../src/modules/scenario-jobs/worker/process-tree';
import { eventually } from './eventually';
import { type LogLine, ServiceProcess } from './service-process';

/** The task module that knows how to misbehave; see there. */
export const ZOO = join(__dirname, 'zoo.mjs');

/** Short times, so that a test of what happens after them need not wait long. */
const SHORT_TIMES = {
  SCENARIO_TASK: ZOO,
  // Not these: a task that stops when it is asked must have the time, however busy the machine is.
  STOP_ACK_MS: '20000',
  STOP_GRACE_MS: '20000',
  STOP_KILL_MS: '400',
  CANCEL_POLL_MS: '300',
  RECONCILE_MS: '300',
  RETRY_BACKOFF_MS: '100',
  DRAIN_MS: '500',
};

/** For tests of tasks that do not stop when they are asked. */
export const IMPATIENT = { STOP_ACK_MS: '400', STOP_GRACE_MS: '600' };

/** For tests of workers that are lost. */
export const SOON_LOST = { CANCEL_POLL_MS: '200', BLIND_MS: '900', WATCHDOG_MS: '1000', WORKER_LOST_MS: '1200' };

export type Job = {
  id: string;
  status: string;
  scenario: { id: string; name: string; url: string } | null;
  error: { code: string; message: string } | null;
  created_at: string;
  started_at: string | null;
  completed_at: string | null;
  duration_seconds: number | null;
  is_new?: boolean;
};

export type Answer<Body> = { status: number; body: Body; headers: Headers };
export type ErrorBody = { error: { type: string; code: string; message: string } };

/** What the row says that the API does not show. */
export type Row = {
  status: string;
  attempt: number;
  run_id: string | null;
  worker_id: string | null;
  started_at: Date | null;
  completed_at: Date | null;
  cancelled_by: string | null;
  stopped_at: Date | null;
  stopped_how: string | null;
};

type StartOptions = {
  workers?: number;
  /** For every process. */
  settings?: Record<string, string>;
  /** For the api alone, given those of every process. */
  api?: (settings: Record<string, string>) => Record<string, string>;
  /** For the workers alone; `startWorker` can have more. */
  worker?: (settings: Record<string, string>) => Record<string, string>;
  /** Other than the one that all tests share; settings can have a longer `REDIS_URL` of the same servers. */
  redisUrl?: string;
  postgresUrl?: string;
};

/**
 * The service with a database, a queue prefix and a workspace of its own: real Postgres, real Redis, real
 * processes. `stop` ends everything that it started and fails if a task's process is left.
 */
export class TestSystem {
  readonly workers: ServiceProcess[] = [];
  api!: ServiceProcess;
  pool!: Pool;
  redis!: Redis;
  workspace!: { id: string; slug: string };
  key!: string;
  keyId!: string;
  private name = `test_${randomBytes(6).toString('hex')}`;

  private constructor(
    readonly settings: Record<string, string>,
    private readonly options: StartOptions,
    private readonly postgresUrl: string,
  ) {}

  static async start(options: StartOptions = {}) {
    const { workers = 1, settings = {}, redisUrl = process.env.TEST_REDIS_URL! } = options;
    const postgresUrl = options.postgresUrl ?? process.env.TEST_POSTGRES_URL!;
    const system = new TestSystem({ ...SHORT_TIMES, ...settings }, options, postgresUrl);
    await system.createDatabase();
    system.settings.REDIS_URL ??= redisUrl;
    system.settings.QUEUE_PREFIX ??= `{${system.name}}`;
    system.redis = new Redis(redisUrl);
    system.redis.on('error', () => undefined);
    ({ workspace: system.workspace, key: system.key, keyId: system.keyId } = await system.createWorkspace());
    await system.startApi();
    const starts = await Promise.allSettled(Array.from({ length: workers }, () => system.startWorker()));
    for (const start of starts) {
      if (start.status === 'fulfilled') continue;
      await system.stop();
      throw start.reason;
    }
    return system;
  }

  private async createDatabase() {
    const client = new Client({ connectionString: this.postgresUrl });
    await client.connect();
    await client.query(`CREATE DATABASE ${this.name} TEMPLATE scenario_jobs_template`);
    await client.end();
    const url = new URL(this.postgresUrl);
    url.pathname = `/${this.name}`;
    this.settings.DATABASE_URL = url.href;
    this.pool = new Pool({ connectionString: url.href, max: 4 });
    this.pool.on('error', () => undefined);
  }

  async createWorkspace(slug = `w-${newId()}`) {
    const workspace = { id: newId(), slug };
    await this.pool.query('INSERT INTO workspaces (id, slug) VALUES ($1, $2)', [workspace.id, slug]);
    return { workspace, ...(await this.createKey(workspace.id)) };
  }

  async createKey(workspaceId: string, times: { expiresAt?: Date; revokedAt?: Date } = {}) {
    const key = newApiKey();
    const keyId = newId();
    await this.pool.query(
      'INSERT INTO api_keys (id, workspace_id, name, hash, expires_at, revoked_at) VALUES ($1, $2, $3, $4, $5, $6)',
      [keyId, workspaceId, 'test', hashApiKey(key), times.expiresAt ?? null, times.revokedAt ?? null],
    );
    return { key, keyId };
  }

  async startApi(settings: Record<string, string> = {}) {
    const own = this.options.api?.(this.settings);
    this.api = await ServiceProcess.start('main.api.js', { ...this.settings, ...own, ...settings });
  }

  async startWorker(settings: Record<string, string> = {}) {
    const own = this.options.worker?.(this.settings);
    const worker = await ServiceProcess.start('main.worker.js', { ...this.settings, ...own, ...settings });
    this.workers.push(worker);
    return worker;
  }

  get jobsUrl() {
    return `${this.api.url}/rest/v1/scenario-studio/jobs`;
  }

  /** One request to the jobs resource, with the system's key unless other headers are given. */
  async request<Body = Job>(
    method: string,
    path = '',
    { body, headers = {} }: { body?: unknown; headers?: Record<string, string> } = {},
  ): Promise<Answer<Body>> {
    const response = await fetch(`${this.jobsUrl}${path}`, {
      method,
      headers: {
        authorization: `Bearer ${this.key}`,
        ...(body !== undefined && { 'content-type': 'application/json' }),
        ...headers,
      },
      ...(body !== undefined && {
        body: typeof body === 'string' || body instanceof Uint8Array ? body : JSON.stringify(body),
      }),
    });
    return { status: response.status, headers: response.headers, body: (await response.json()) as Body };
  }

  /** Creates a job for the zoo: the species is the prompt. */
  async create(prompt: string, fields: Record<string, unknown> = {}): Promise<Job> {
    const { status, body } = await this.request('POST', '', {
      body: { user_email: 'ada@example.com', prompt, ...fields },
    });
    if (status !== 201) throw new Error(`create answered ${status}: ${JSON.stringify(body)}`);
    return body;
  }

  async get(jobId: string): Promise<Job> {
    return (await this.request('GET', `/${jobId}`)).body;
  }

  cancel(jobId: string, headers: Record<string, string> = {}) {
    return this.request<Job & ErrorBody>('DELETE', `/${jobId}`, { headers });
  }

  /** What the api has logged until now, all of it: its last lines are written a moment later. */
  async apiLog(): Promise<LogLine[]> {
    const id = randomUUID();
    await fetch(`${this.api.url}/livez`, { headers: { 'x-request-id': id } });
    await eventually('the log is written', () => this.api.logs.some(({ requestId }) => requestId === id));
    return this.api.logs;
  }

  async row(jobId: string): Promise<Row> {
    const { rows } = await this.pool.query<Row>('SELECT * FROM scenario_jobs WHERE id = $1', [jobId]);
    return rows[0] as Row;
  }

  async scenarioCount(jobId: string): Promise<number> {
    const { rows } = await this.pool.query<{ count: number }>('SELECT count(*)::int FROM scenarios WHERE job_id = $1', [
      jobId,
    ]);
    return rows[0]?.count as number;
  }

  untilStatus(jobId: string, ...statuses: string[]) {
    return eventually(`job ${jobId} is ${statuses.join(' or ')}`, async () => {
      const job = await this.get(jobId);
      if (statuses.includes(job.status)) return job;
      throw new Error(`it is ${job.status} ${JSON.stringify(job.error)}`);
    });
  }

  untilStopped(jobId: string) {
    return eventually(`job ${jobId} is confirmed stopped`, async () => {
      const row = await this.row(jobId);
      return row.stopped_at && row;
    });
  }

  /** Waits until the job's task has said `word`, and returns the process id of the task. */
  async untilTaskSays(jobId: string, word = 'running'): Promise<number> {
    const line = await eventually(`the task of ${jobId} says ${word}`, () =>
      this.workers
        .flatMap((worker) => worker.logs)
        .findLast((log) => log.jobId === jobId && String(log.line).startsWith(word)),
    );
    return Number(String(line.line).split(' ')[1]);
  }

  /** Creates a job, waits until its task runs, and returns both. */
  async createRunning(prompt: string) {
    const job = await this.create(prompt);
    const pid = await this.untilTaskSays(job.id);
    return { job, pid };
  }

  /** Inserts so many queued jobs that the queue does not know, and returns their ids, in order. */
  async insertQueued(count: number, workspaceId = this.workspace.id): Promise<string[]> {
    const ids = Array.from({ length: count }, newId).sort();
    await this.pool.query(
      `INSERT INTO scenario_jobs (id, workspace_id, user_email, prompt)
       SELECT unnest($1::text[]), $2, 'ada@example.com', 'cooperative'`,
      [ids, workspaceId],
    );
    return ids;
  }

  /** How many entries of the queue there are for the job. */
  isQueued(jobId: string) {
    return this.redis.exists(`${this.settings.QUEUE_PREFIX}:scenario-jobs:${jobId}`);
  }

  /** While `work` runs, somebody else has locked the row of a job, or of something else. */
  async lockRow<T>(id: string, work: () => Promise<T>, table = 'scenario_jobs'): Promise<T> {
    const client = await this.pool.connect();
    try {
      await client.query('BEGIN');
      await client.query(`SELECT FROM ${table} WHERE id = $1 FOR UPDATE`, [id]);
      return await work();
    } finally {
      client.release(true);
    }
  }

  /** While `work` runs, nobody can connect to the database and every connection to it is cut. */
  async cutPostgres(work: () => Promise<void>) {
    const server = new Client({ connectionString: this.postgresUrl });
    await server.connect();
    try {
      await server.query(`ALTER DATABASE ${this.name} ALLOW_CONNECTIONS false`);
      await server.query('SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1', [this.name]);
      await work();
    } finally {
      await server.query(`ALTER DATABASE ${this.name} ALLOW_CONNECTIONS true`);
      await server.end();
    }
  }

  async stop() {
    await Promise.all(this.workers.map((worker) => worker.stop()));
    await this.api.stop();
    await this.pool.end();
    this.redis.disconnect();
    const began = this.workers
      .flatMap((worker) => worker.logs)
      // Without a process id there was no process.
      .filter(({ msg, taskPid }) => msg === 'run began' && taskPid !== 0);
    for (const { taskPid, jobId } of began) {
      await eventually(`the process of ${jobId} is gone`, async () => !(await groupIsAlive(taskPid as number)));
    }
  }
}

/** Whether any process of the group of this task lives. A zombie, which nobody has buried yet, does not. */
export async function groupIsAlive(pid: number): Promise<boolean> {
  return (await livingMembers(new Set([pid]), [])).length > 0;
}

/** Whether this process lives; a zombie does not. */
export function isAlive(pid: number): boolean {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    return !/^[ZX]/.test(stat.slice(stat.lastIndexOf(')') + 2));
  } catch {
    return false;
  }
}
