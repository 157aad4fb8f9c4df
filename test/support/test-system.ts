import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Redis } from 'ioredis';
import { livingMembers } from '../../src/modules/scenario-jobs/worker/process-tree';
import { eventually } from './eventually';
import { type LogLine, ServiceProcess } from './service-process';
import { TestDatabase } from './test-database';

/** The task module with every kind of misbehaviour; see there. */
export const ZOO = join(__dirname, 'zoo.mjs');

/** Short times, so that tests of what happens after them need not wait long. */
const SHORT_TIMES = {
  SCENARIO_TASK: ZOO,
  // Not these two: a task that stops when it is asked must have the time, however busy the machine is.
  STOP_ACK_MS: '20000',
  STOP_GRACE_MS: '20000',
  STOP_KILL_MS: '400',
  CANCEL_POLL_MS: '300',
  RECONCILE_MS: '300',
  RETRY_BACKOFF_MS: '100',
  DRAIN_MS: '500',
};

/** For tests of tasks that do not stop when asked. */
export const IMPATIENT = { STOP_ACK_MS: '400', STOP_GRACE_MS: '600' };

/** For tests of what a worker learns by other means than the poll. */
export const NO_POLL = { CANCEL_POLL_MS: '3600000', BLIND_MS: '7200000', WORKER_LOST_MS: '10800000' };

/** For tests of lost workers. */
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

type StartOptions = {
  workers?: number;
  /** For every process. */
  settings?: Record<string, string>;
  /** For the api alone; is given the settings of every process. */
  api?: (settings: Record<string, string>) => Record<string, string>;
  /** For the workers alone; `startWorker` can add more. */
  worker?: (settings: Record<string, string>) => Record<string, string>;
  /** Another Redis than the one that all tests share; settings can have a longer `REDIS_URL` of the same servers. */
  redisUrl?: string;
  postgresUrl?: string;
};

/**
 * The service with a database, a queue prefix and a workspace of its own: real Postgres, real Redis, real
 * processes. `stop` ends everything that it started and fails if a task's process is left.
 */
export class TestSystem extends TestDatabase {
  readonly workers: ServiceProcess[] = [];
  api!: ServiceProcess;
  readonly settings: Record<string, string>;
  readonly redis: Redis;
  private readonly files: string[] = [];

  private constructor(private readonly options: StartOptions) {
    const { redisUrl = process.env.TEST_REDIS_URL!, postgresUrl = process.env.TEST_POSTGRES_URL! } = options;
    super(postgresUrl);
    this.settings = {
      ...SHORT_TIMES,
      DATABASE_URL: this.url,
      REDIS_URL: redisUrl,
      QUEUE_PREFIX: `{${this.name}}`,
      ...options.settings,
    };
    this.redis = new Redis(redisUrl);
    this.redis.on('error', () => undefined);
  }

  static async start(options: StartOptions = {}) {
    const system = new TestSystem(options);
    const { workers = 1 } = options;
    try {
      await system.fill();
      const starts = [system.startApi(), ...Array.from({ length: workers }, () => system.startWorker())];
      const failed = (await Promise.allSettled(starts)).find(({ status }) => status === 'rejected');
      if (failed) throw (failed as PromiseRejectedResult).reason;
      return system;
    } catch (error) {
      await system.stop();
      throw error;
    }
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

  /** Sends one request to the jobs resource, with the system's key unless other headers are given. */
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

  /** Everything that the api has logged until now, including its last lines, which are written a moment later. */
  async apiLog(): Promise<LogLine[]> {
    const id = randomUUID();
    await fetch(`${this.api.url}/livez`, { headers: { 'x-request-id': id } });
    await eventually('the log is written', () => this.api.logs.some(({ requestId }) => requestId === id));
    return this.api.logs;
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

  /** The same for a job whose task goes on until `finish` is called, and then has a result. */
  async createPatient() {
    const file = join(tmpdir(), `scenario-jobs-${this.name}-${randomUUID()}`);
    this.files.push(file);
    return { ...(await this.createRunning(`patient ${file}`)), finish: () => writeFile(file, '') };
  }

  /** How many entries the queue has for the job. */
  isQueued(jobId: string) {
    return this.redis.exists(`${this.settings.QUEUE_PREFIX}:scenario-jobs:${jobId}`);
  }

  async stop() {
    const processes = [...this.workers, ...((this.api as ServiceProcess | undefined) ? [this.api] : [])];
    await Promise.all(processes.map((one) => one.stop()));
    await this.close();
    this.redis.disconnect();
    for (const file of this.files) await rm(file, { force: true });
    const began = this.workers
      .flatMap((worker) => worker.logs)
      // Without a process id there was no process.
      .filter(({ msg, taskPid }) => msg === 'run began' && taskPid !== 0);
    for (const { taskPid, jobId } of began) {
      await eventually(`the process of ${jobId} is gone`, async () => !(await groupIsAlive(taskPid as number)));
    }
  }
}

/** Whether any process of this task's group lives. A zombie does not. */
export async function groupIsAlive(pid: number): Promise<boolean> {
  return (await livingMembers(new Set([pid]), [])).length > 0;
}

/** Whether this process lives; a zombie does not. */
export function isAlive(pid: number): boolean {
  return !['Z', 'X', undefined].includes(stateOf(pid));
}

/** Whether SIGSTOP has reached this process: until then it can still wake up and receive messages. */
export function isFrozen(pid: number): boolean {
  return stateOf(pid) === 'T';
}

/** The letter that `ps` shows for the state of a process; undefined if the process is gone. */
function stateOf(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    return stat[stat.lastIndexOf(')') + 2];
  } catch {
    return undefined;
  }
}
