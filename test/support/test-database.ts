import { randomBytes } from 'node:crypto';
import { Client, Pool } from 'pg';
import { pino } from 'pino';
import { hashApiKey, newApiKey } from '../../src/auth/api-key';
import { parseSettings } from '../../src/config/settings';
import { Database } from '../../src/infrastructure/database';
import { newId } from '../../src/infrastructure/ids';

/** The columns of a job's row that the API does not show. */
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

/** A migrated database of its own in a real Postgres, with a workspace and an API key. */
export class TestDatabase {
  readonly url: string;
  readonly pool: Pool;
  workspace!: { id: string; slug: string };
  key!: string;
  keyId!: string;
  protected readonly name = `test_${randomBytes(6).toString('hex')}`;
  private readonly opened: Database[] = [];

  protected constructor(private readonly serverUrl: string) {
    const url = new URL(serverUrl);
    url.pathname = `/${this.name}`;
    this.url = url.href;
    this.pool = new Pool({ connectionString: this.url, max: 4 });
    this.pool.on('error', () => undefined);
  }

  static async create(): Promise<TestDatabase> {
    const database = new TestDatabase(process.env.TEST_POSTGRES_URL!);
    await database.fill();
    return database;
  }

  protected async fill() {
    const client = new Client({ connectionString: this.serverUrl });
    await client.connect();
    await client.query(`CREATE DATABASE ${this.name} TEMPLATE scenario_jobs_template`);
    await client.end();
    ({ workspace: this.workspace, key: this.key, keyId: this.keyId } = await this.createWorkspace());
  }

  async createWorkspace(slug = `w-${newId()}`) {
    const workspace = { id: newId(), slug };
    await this.pool.query('INSERT INTO workspaces (id, slug) VALUES ($1, $2)', [workspace.id, slug]);
    return { workspace, ...(await this.createKey(workspace.id)) };
  }

  async createKey(workspaceId: string, given: { name?: string; expiresAt?: Date; revokedAt?: Date } = {}) {
    const key = newApiKey();
    const keyId = newId();
    await this.pool.query(
      'INSERT INTO api_keys (id, workspace_id, name, hash, expires_at, revoked_at) VALUES ($1, $2, $3, $4, $5, $6)',
      [keyId, workspaceId, given.name ?? 'test', hashApiKey(key), given.expiresAt ?? null, given.revokedAt ?? null],
    );
    return { key, keyId };
  }

  /**
   * The database as the service's own code uses it, by a URL with `query` appended. Closed by `close`, if not before.
   */
  prisma(query = '', url = this.url): Database {
    const settings = parseSettings({ DATABASE_URL: url + query, REDIS_URL: process.env.TEST_REDIS_URL! });
    const database = new Database(settings, pino({ level: 'silent' }));
    this.opened.push(database);
    return database;
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

  /** Inserts this many queued jobs that the queue does not know, and returns their ids, in order. */
  async insertQueued(count: number, workspaceId = this.workspace.id): Promise<string[]> {
    const ids = Array.from({ length: count }, newId).sort();
    await this.pool.query(
      `INSERT INTO scenario_jobs (id, workspace_id, user_email, prompt)
       SELECT unnest($1::text[]), $2, 'ada@example.com', 'cooperative'`,
      [ids, workspaceId],
    );
    return ids;
  }

  /** Runs `work` while another connection holds a lock on a job's row, on several rows, or on rows of another table. */
  async lockRow<T>(id: string | string[], work: () => Promise<T>, table = 'scenario_jobs'): Promise<T> {
    const client = await this.pool.connect();
    try {
      await client.query('BEGIN');
      await client.query(`SELECT FROM ${table} WHERE id = ANY ($1) FOR UPDATE`, [[id].flat()]);
      return await work();
    } finally {
      client.release(true);
    }
  }

  /** Runs `work` while nobody can connect to the database and every connection to it is cut. */
  async cutPostgres(work: () => Promise<void>) {
    const server = new Client({ connectionString: this.serverUrl });
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

  async close() {
    for (const database of this.opened) await database.$disconnect();
    await this.pool.end();
  }
}
