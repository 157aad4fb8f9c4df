import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { eventually } from './eventually';

/** The built service, or a copy of it that a test has put a fault into. */
export const DIST = process.env.SERVICE_DIST ?? join(__dirname, '../../dist');

export type LogLine = Record<string, unknown> & { msg?: string; jobId?: string; runId?: string };

/** An api or a worker: the built program in a process of its own. */
export class ServiceProcess {
  readonly logs: LogLine[] = [];
  /** Printed lines that are not log lines. */
  readonly printed: string[] = [];
  private readonly child: ChildProcess;

  private constructor(entry: string, environment: Record<string, string>) {
    this.child = spawn(process.execPath, [join(DIST, entry)], {
      env: {
        PATH: process.env.PATH,
        HOST: '127.0.0.1',
        PORT: '0',
        WORKER_PORT: '0',
        LOG_LEVEL: 'debug',
        ...environment,
      },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    for (const stream of [this.child.stdout, this.child.stderr]) {
      if (stream) createInterface({ input: stream }).on('line', (line) => this.take(line));
    }
  }

  /** Starts the program and waits until it listens. */
  static async start(entry: 'main.api.js' | 'main.worker.js', environment: Record<string, string>) {
    const started = new ServiceProcess(entry, environment);
    try {
      await eventually(`${entry} listens`, () => {
        if (started.exit) {
          throw new Error(`${entry} ended: ${started.printed.join('\n')} ${JSON.stringify(started.logs.at(-1))}`);
        }
        return started.url !== undefined;
      });
      return started;
    } catch (error) {
      started.signal('SIGKILL');
      throw error;
    }
  }

  /** Starts the program, and waits until it ends by itself. */
  static async runToEnd(entry: string, environment: Record<string, string>) {
    const started = new ServiceProcess(entry, environment);
    await once(started.child, 'close');
    return started;
  }

  get url(): string | undefined {
    return this.logs.find((line) => / is listening$/.test(line.msg ?? ''))?.url as string | undefined;
  }

  get pid(): number {
    return this.child.pid as number;
  }

  get exit(): { code: number | null; signal: NodeJS.Signals | null } | undefined {
    const { exitCode: code, signalCode: signal } = this.child;
    return code === null && signal === null ? undefined : { code, signal };
  }

  signal(signal: NodeJS.Signals): void {
    this.child.kill(signal);
  }

  /** The first line with this message about this job. */
  logged(message: string, jobId?: string): LogLine | undefined {
    return this.logs.find((line) => line.msg === message && (jobId === undefined || line.jobId === jobId));
  }

  /** Waits for such a line. */
  untilLogged(message: string, jobId?: string): Promise<LogLine> {
    return eventually(`"${message}" is logged`, () => this.logged(message, jobId));
  }

  /** The metrics that the process shows, as text. */
  async metrics(): Promise<string> {
    return (await fetch(`${this.url}/metrics`)).text();
  }

  /** The sum of everything that a histogram has observed, whatever its labels. */
  async observed(histogram: string): Promise<number> {
    const text = await this.metrics();
    if (!text.includes(`# TYPE ${histogram} histogram\n`)) throw new Error(`there is no histogram ${histogram}`);
    const sums = text.split('\n').filter((line) => line.startsWith(`${histogram}_sum`));
    return sums.reduce((total, line) => total + Number(line.split(' ').at(-1)), 0);
  }

  /** Stops reading what the process prints, like a busy reader, until `readOn`. */
  holdReading(): void {
    this.child.stdout?.pause();
  }

  readOn(): void {
    this.child.stdout?.resume();
  }

  async ended() {
    if (!this.exit) await once(this.child, 'exit');
    return this.exit;
  }

  async stop(signal: NodeJS.Signals = 'SIGTERM') {
    if (this.exit) return;
    this.signal('SIGCONT');
    this.signal(signal);
    await this.ended();
  }

  private take(line: string) {
    try {
      this.logs.push(JSON.parse(line) as LogLine);
    } catch {
      this.printed.push(line);
    }
  }
}
