import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

export const ORDERS = ['complete', 'fail', 'retry', 'deafen', 'resist', 'spin'] as const;
export type Order = (typeof ORDERS)[number];
export type Puppet = { jobId: string; pid: number; socket: Socket };

/** The tasks of the machine's jobs: every process that ever ran for a job, in the order in which they began. */
export class Puppets {
  private readonly folder = mkdtempSync(join(tmpdir(), 'scenario-jobs-machine-'));
  readonly path = join(this.folder, 'socket');
  private readonly began: Puppet[] = [];
  private readonly standing = new Map<string, Order>();
  private readonly server = createServer((socket) => {
    socket.on('error', () => undefined);
    const lines = createInterface({ input: socket }).on('error', () => undefined);
    lines.once('line', (line) => {
      const puppet = { ...(JSON.parse(line) as { jobId: string; pid: number }), socket };
      this.began.push(puppet);
      const order = this.standing.get(puppet.jobId);
      if (order) this.tell(puppet, order);
    });
  });

  async listen(): Promise<void> {
    await new Promise<void>((resolve) => this.server.listen(this.path, resolve));
  }

  of(jobId: string): Puppet[] {
    return this.began.filter((puppet) => puppet.jobId === jobId);
  }

  /** The tasks that are still connected, and so have not ended. */
  alive(jobId: string): Puppet[] {
    return this.of(jobId).filter(({ socket }) => !socket.destroyed && socket.writable);
  }

  tell({ socket }: Puppet, order: Order): void {
    socket.write(`${order}\n`);
  }

  /** Gives the order to every task that runs the job, now or later. */
  tellFromNowOn(jobId: string, order: Order): void {
    this.standing.set(jobId, order);
    for (const puppet of this.alive(jobId)) this.tell(puppet, order);
  }

  stop(): void {
    for (const { socket } of this.began) socket.destroy();
    this.server.close();
    rmSync(this.folder, { recursive: true, force: true });
  }
}
