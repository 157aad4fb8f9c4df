import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { Queue } from 'bullmq';
import { eventually } from '../support/eventually';
import { OwnRedis } from '../support/own-redis';
import { type ServiceProcess } from '../support/service-process';
import { TcpProxy } from '../support/tcp-proxy';
import { TestSystem } from '../support/test-system';
import { Puppets } from './puppets';

const WORKERS = 2;

/** As short as the settings allow, so that nothing has to wait long for a time to pass. */
const TIMES = {
  CANCEL_POLL_MS: '300',
  RECONCILE_MS: '300',
  LOCK_MS: '1000',
  WATCHDOG_MS: '1000',
  BLIND_MS: '1000',
  WORKER_LOST_MS: '1500',
  STOP_ACK_MS: '500',
  STOP_GRACE_MS: '500',
  STOP_KILL_MS: '300',
  RETRY_BACKOFF_MS: '20',
  MAX_ATTEMPTS: '1000',
  DRAIN_MS: '0',
  WORKER_CONCURRENCY: '8',
};

/** Real processes for the machine, and what can be done to them. A world lasts for many rounds. */
export class World {
  private constructor(
    readonly system: TestSystem,
    readonly puppets: Puppets,
    private readonly redis: OwnRedis,
    private readonly proxy: TcpProxy,
    private readonly queue: Queue,
  ) {}

  static async start(): Promise<World> {
    const redis = await OwnRedis.start();
    const proxy = await TcpProxy.start(process.env.TEST_POSTGRES_URL!);
    const puppets = new Puppets();
    await puppets.listen();
    const throughProxy = (settings: Record<string, string>) => ({
      DATABASE_URL: proxy.through(settings.DATABASE_URL!),
    });
    const system = await TestSystem.start({
      redisUrl: redis.url,
      workers: WORKERS,
      api: throughProxy,
      worker: throughProxy,
      settings: {
        ...TIMES,
        SCENARIO_TASK: require.resolve('./puppet.mjs'),
        TASK_ENV: 'MACHINE_SOCKET',
        MACHINE_SOCKET: puppets.path,
      },
    });
    await dropGuards(system);
    const queue = new Queue('scenario-jobs', {
      connection: system.redis,
      prefix: system.settings.QUEUE_PREFIX!,
      defaultJobOptions: { removeOnComplete: true, removeOnFail: true, priority: 1 },
    });
    return new World(system, puppets, redis, proxy, queue);
  }

  async stop(): Promise<void> {
    await this.queue.close();
    await this.system.stop();
    this.puppets.stop();
    await this.proxy.stop();
    await this.redis.stop();
  }

  /** From now on whatever goes to or comes from Postgres takes up to `mostMs` longer, a different time each time. */
  jitter(random: () => number, mostMs: number): void {
    this.proxy.slow(() => random() * mostMs);
  }

  private living(): ServiceProcess[] {
    return this.system.workers.filter((worker) => !worker.exit);
  }

  /** Kills a worker, and starts another. */
  async replaceWorker(which: number): Promise<void> {
    const living = this.living();
    await living[which % living.length]!.stop('SIGKILL');
    await this.system.startWorker();
  }

  freezeWorker(which: number): void {
    const living = this.living();
    living[which % living.length]!.signal('SIGSTOP');
  }

  thawWorkers(): void {
    for (const worker of this.living()) worker.signal('SIGCONT');
  }

  /** While doorbells are lost, the api may not publish: Redis refuses, and the worker hears nothing. */
  async loseDoorbells(lost: boolean): Promise<void> {
    await this.system.redis.call('ACL', 'SETUSER', 'default', lost ? '-publish' : '+publish');
  }

  /** Tells the job's worker that its run was cancelled, although it may not be. */
  async forgeDoorbell(jobId: string): Promise<void> {
    const { run_id: runId, worker_id: workerId } = await this.system.row(jobId);
    if (!runId || !workerId) return;
    const channel = `${this.system.settings.QUEUE_PREFIX}:cancel:${workerId}`;
    const message = { runId, stopToken: randomUUID(), cancelledAt: Date.now() };
    // While doorbells are lost, the test's own connection may not publish either.
    await this.system.redis.publish(channel, JSON.stringify(message)).catch(() => undefined);
  }

  /**
   * Makes Redis forget that the job was delivered, and deliver it again, while its worker looks lost until its next
   * sign of life: another run takes over, while the earlier one goes on.
   */
  async redeliver(jobId: string): Promise<void> {
    const key = this.queue.toKey(jobId);
    await this.system.redis
      .multi()
      .del(key, `${key}:lock`)
      .lrem(this.queue.toKey('active'), 0, jobId)
      .zrem(this.queue.toKey('stalled'), jobId)
      .exec()
      .catch(() => undefined);
    await this.system.pool.query(
      `UPDATE workers SET seen_at = now() - interval '1 hour'
       WHERE id = (SELECT worker_id FROM scenario_jobs WHERE id = $1)`,
      [jobId],
    );
    await this.queue.add('run', {}, { jobId });
  }

  /** Resolves once another run has the job, or after a while. */
  async untilTakenOver(jobId: string, runId: string | null, milliseconds: number): Promise<void> {
    const takenOver = async () => {
      const { run_id: newest } = await this.system.row(jobId);
      return newest !== null && newest !== runId;
    };
    await eventually('another run takes over', takenOver, milliseconds).catch(() => undefined);
  }

  async wipeRedis(): Promise<void> {
    await this.system.redis.flushall();
  }

  /** Makes everything work again, with enough workers. */
  async heal(): Promise<void> {
    this.thawWorkers();
    await this.loseDoorbells(false);
    while (this.living().length < WORKERS) await this.system.startWorker();
  }

  /** Waits a moment for something that may happen by itself. */
  async untilOrLonger(milliseconds: number, look: () => boolean): Promise<void> {
    await eventually('something', look, milliseconds).catch(() => undefined);
  }

  async pass(milliseconds: number): Promise<void> {
    await sleep(milliseconds);
  }

  /** What processes complained of that no fault in this world explains. */
  complaints(): string[] {
    return [this.system.api, ...this.system.workers]
      .flatMap((each) => each.logs)
      .filter((line) => line.msg === 'unexpected error' || line.level === 'fatal')
      .map((line) => JSON.stringify(line));
  }
}

/** Drops the database's own checks: they refuse what the code must never try, and would hide here that it does. */
async function dropGuards({ pool }: TestSystem): Promise<void> {
  const { rows } = await pool.query<{ table: string; name: string }>(
    `SELECT conrelid::regclass::text AS table, conname AS name FROM pg_constraint
     WHERE contype = 'c' AND conrelid IN ('scenario_jobs'::regclass, 'scenarios'::regclass)`,
  );
  for (const { table, name } of rows) await pool.query(`ALTER TABLE ${table} DROP CONSTRAINT "${name}"`);
  for (const table of ['scenario_jobs', 'scenarios']) {
    await pool.query(`ALTER TABLE ${table} DISABLE TRIGGER ALL`);
  }
}
