import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { createInterface, type Interface } from 'node:readline';

/** A migrated Postgres that a test may restart, crash and overload as it likes. */
export class OwnPostgres {
  url!: string;
  private constructor(
    private readonly keeper: ChildProcess,
    private readonly answers: Interface,
  ) {}

  static async start(flags: string[] = []): Promise<OwnPostgres> {
    const keeper = spawn(process.execPath, [join(__dirname, 'postgres-keeper.mjs'), ...flags], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    const postgres = new OwnPostgres(keeper, createInterface({ input: keeper.stdout }));
    postgres.url = await postgres.answer();
    return postgres;
  }

  /** Ends Postgres, gently or as a crash does, and starts it again on the same port. */
  async restart(how: 'fast' | 'immediate'): Promise<void> {
    this.keeper.stdin?.write(`${how}\n`);
    await this.answer();
  }

  async stop(): Promise<void> {
    this.keeper.stdin?.end();
    await once(this.keeper, 'exit');
  }

  private async answer(): Promise<string> {
    const [line] = (await Promise.race([
      once(this.answers, 'line'),
      once(this.keeper, 'exit').then(() => {
        throw new Error('Postgres did not start');
      }),
    ])) as [string];
    return line;
  }
}
