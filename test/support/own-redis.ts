import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Redis } from 'ioredis';
import { eventually } from './eventually';

/** A Redis that a test may wipe, freeze and restart as it likes. */
export class OwnRedis {
  readonly url: string;
  private readonly folder = mkdtempSync(join(tmpdir(), 'scenario-jobs-redis-'));
  private server!: ChildProcess;

  private constructor(
    private readonly program: string,
    readonly port: number,
    private readonly flags: string[],
  ) {
    this.url = `redis://127.0.0.1:${port}`;
  }

  static async start(flags: string[] = []): Promise<OwnRedis> {
    const redis = new OwnRedis(await programOfSharedRedis(), await freePort(), flags);
    return redis.launched();
  }

  /** Starts a sentinel that watches this master, and makes another Redis the master when it dies. */
  static async startSentinel(master: OwnRedis): Promise<OwnRedis> {
    const redis = new OwnRedis(await programOfSharedRedis(), await freePort(), ['--sentinel']);
    writeFileSync(
      join(redis.folder, 'sentinel.conf'),
      `sentinel monitor mymaster 127.0.0.1 ${master.port} 2\n` +
        'sentinel down-after-milliseconds mymaster 1000\nsentinel failover-timeout mymaster 5000\n',
    );
    await redis.launched();
    // By itself a sentinel looks at the others every 10 s; before Redis 7 it cannot be made faster.
    await redis.command('sentinel', 'debug', 'info-period', '1000', 'publish-period', '500').catch(() => undefined);
    return redis;
  }

  private async launched(): Promise<this> {
    try {
      await this.launch();
      return this;
    } catch (error) {
      await this.stop();
      throw error;
    }
  }

  /** Freezes Redis: connections stay open and nothing is answered. */
  pause(): void {
    this.server.kill('SIGSTOP');
  }

  resume(): void {
    this.server.kill('SIGCONT');
  }

  /** Makes its background save fail: Redis then refuses to change anything (MISCONF), as when a disk is full. */
  async failToSave(): Promise<void> {
    // A folder where the file belongs makes the save fail whoever runs Redis.
    mkdirSync(join(this.folder, 'dump.rdb', 'in-the-way'), { recursive: true });
    await this.command('config', 'set', 'save', '3600 1000000');
    await this.save('err');
  }

  async saveAgain(): Promise<void> {
    rmSync(join(this.folder, 'dump.rdb'), { recursive: true });
    await this.save('ok');
  }

  private async save(outcome: 'ok' | 'err'): Promise<void> {
    await this.command('bgsave');
    await eventually(`a background save ends: ${outcome}`, async () =>
      String(await this.command('info', 'persistence')).includes(`rdb_last_bgsave_status:${outcome}`),
    );
  }

  /** Sends any command, on a connection of its own. */
  async command(name: string, ...args: string[]): Promise<unknown> {
    const client = new Redis(this.url);
    try {
      return await client.call(name, ...args);
    } finally {
      client.disconnect();
    }
  }

  /** Ends Redis and starts it again with what it had kept on disk. */
  async restart(): Promise<void> {
    await this.end();
    await this.launch();
  }

  /** Ends Redis as a power failure does. */
  async kill(): Promise<void> {
    this.server.kill('SIGKILL');
    if (this.server.signalCode === null) await once(this.server, 'exit');
  }

  async stop(): Promise<void> {
    await this.end();
    rmSync(this.folder, { recursive: true, force: true });
  }

  async launch(): Promise<void> {
    const sentinel = this.flags.includes('--sentinel');
    const args = [
      ...(sentinel ? [join(this.folder, 'sentinel.conf')] : ['--save', '', '--appendonly', 'yes']),
      ...['--port', String(this.port), '--bind', '127.0.0.1', '--dir', this.folder, ...this.flags],
    ];
    this.server = spawn(this.program, args, { argv0: 'redis-server', stdio: 'ignore' });
    const client = new Redis(this.url, { retryStrategy: () => 20 });
    client.on('error', () => undefined);
    try {
      await eventually('Redis answers', async () => (await client.ping()) === 'PONG');
    } finally {
      client.disconnect();
    }
  }

  /** Ends Redis: connections are cut and new ones refused. What it had kept on disk stays. */
  async end(): Promise<void> {
    this.resume();
    if (this.server.exitCode !== null || this.server.signalCode !== null) return;
    this.server.kill('SIGTERM');
    await once(this.server, 'exit');
  }
}

async function programOfSharedRedis(): Promise<string> {
  const client = new Redis(process.env.TEST_REDIS_URL as string);
  const info = await client.info('server');
  client.disconnect();
  return /^executable:(.+?)\r?$/m.exec(info)?.[1] as string;
}

export async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, 'close');
  return port;
}
