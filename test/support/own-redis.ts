import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
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
    private readonly port: number,
  ) {
    this.url = `redis://127.0.0.1:${port}`;
  }

  static async start(): Promise<OwnRedis> {
    const redis = new OwnRedis(await programOfSharedRedis(), await freePort());
    await redis.launch();
    return redis;
  }

  /** Freezes it: connections stay open and nothing is answered. */
  pause(): void {
    this.server.kill('SIGSTOP');
  }

  resume(): void {
    this.server.kill('SIGCONT');
  }

  /** Ends it and starts it again with what it had kept on disk. */
  async restart(): Promise<void> {
    await this.end();
    await this.launch();
  }

  async stop(): Promise<void> {
    await this.end();
    rmSync(this.folder, { recursive: true, force: true });
  }

  async launch(): Promise<void> {
    const args = [
      '--port',
      String(this.port),
      '--bind',
      '127.0.0.1',
      '--dir',
      this.folder,
      '--save',
      '',
      '--appendonly',
      'yes',
    ];
    this.server = spawn(this.program, args, { argv0: 'redis-server', stdio: 'ignore' });
    const client = new Redis(this.url, { retryStrategy: () => 20 });
    client.on('error', () => undefined);
    await eventually('Redis answers', async () => (await client.ping()) === 'PONG');
    client.disconnect();
  }

  /** Ends it: connections are cut, and new ones refused. What it had kept on disk stays. */
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

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, 'close');
  return port;
}
