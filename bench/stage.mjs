// What is measured and what it runs on: a Postgres and a Redis of our own, databases, apis, workers.
import { once } from 'node:events';
import { rmSync } from 'node:fs';
import { join } from 'node:path';
import { root } from '../scripts/prepare.mjs';
import { Processes } from '../scripts/processes.mjs';
import { freePort, reachable, startPostgres, startRedis } from '../scripts/servers.mjs';
import { endOnSignal, nodeFlagsOf, untilReady } from '../scripts/service.mjs';
import { startHelper } from './helper.mjs';

/** More than scripts/servers.mjs allows: two hundred simulated workers have a connection each. */
const POSTGRES_FLAGS = ['-c', 'max_connections=500', '-c', 'fsync=on', '-c', 'synchronous_commit=on'];

/** The database with the service's tables of which the others are copies. */
const MIGRATED = 'migrated';

export class Stage {
  #migrated;

  static async open(say) {
    const stage = new Stage();
    stage.place = reachable(join(root, '.local', 'bench'));
    stage.processes = await Processes.open(stage.place);
    for (const left of ['postgres', 'redis']) rmSync(join(stage.place, left), { recursive: true, force: true });
    const cleanUp = () => rmSync(stage.place, { recursive: true, force: true, maxRetries: 5 });
    stage.ending = endOnSignal(stage.processes, { say, cleanUp, patienceMs: 5000 });
    const { onExit } = stage.ending;
    try {
      stage.postgresUrl = await startPostgres(stage.processes, stage.place, { flags: POSTGRES_FLAGS, onExit });
      stage.redisUrl = await startRedis(stage.processes, stage.place, { say, onExit });
    } catch (error) {
      await stage.processes.stop();
      throw error;
    }
    return stage;
  }

  /** Stops everything. If something failed, the folder stays, because the logs are in it. */
  async close({ failed }) {
    await this.processes.stop({ patienceMs: 5000 });
    if (!failed) rmSync(this.place, { recursive: true, force: true, maxRetries: 5 });
  }

  /** Creates a database with the service's tables, or an empty one. */
  async createDatabase(name, { migrated = true } = {}) {
    if (!migrated) return this.#create(name, 'template1');
    await (this.#migrated ??= this.#migrate());
    return this.#create(name, MIGRATED);
  }

  async #migrate() {
    const env = { ...process.env, DATABASE_URL: await this.#create(MIGRATED, 'template1') };
    await this.processes.run('migrate', process.execPath, [join(root, 'dist/cli/migrate.js')], { env });
  }

  async #create(name, template) {
    const { default: pg } = await import('pg');
    const admin = new pg.Client({ connectionString: this.postgresUrl });
    await admin.connect();
    await admin.query(`CREATE DATABASE "${name}" TEMPLATE "${template}"`);
    await admin.end();
    return this.postgresUrl.replace(/postgres$/, name);
  }

  /** Starts `main.api.js` or `main.worker.js` as it is shipped, and waits until it is ready. */
  async startService(name, program, environment, nodeFlags = []) {
    const port = await freePort();
    const env = {
      ...process.env,
      NODE_ENV: 'production',
      HOST: '127.0.0.1',
      REDIS_URL: this.redisUrl,
      PORT: String(port),
      WORKER_PORT: String(port),
      ...environment,
    };
    const args = [...nodeFlagsOf(program), ...nodeFlags, join(root, 'dist', program)];
    return this.#startServer(name, args, env, port);
  }

  /** Starts the floor, the hand-written server, with the same flags of Node as an api. */
  async startFloor(name, environment) {
    const port = await freePort();
    const env = {
      ...process.env,
      NODE_ENV: 'production',
      PORT: String(port),
      REDIS_URL: this.redisUrl,
      ...environment,
    };
    return this.#startServer(name, [...nodeFlagsOf('main.api.js'), join(root, 'bench/floor-server.mjs')], env, port);
  }

  async #startServer(name, args, env, port) {
    const began = performance.now();
    let asked = false;
    const onExit = (why) => asked || this.ending.onExit(why);
    const child = this.processes.start(name, process.execPath, args, { env, onExit });
    const url = `http://127.0.0.1:${port}`;
    await untilReady(url, () => this.ending.isEnding() && `${name} is being stopped`);
    const startMs = performance.now() - began;
    const stop = async () => {
      asked = true;
      child.kill('SIGTERM');
      if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
    };
    return { name, port, url, pid: child.pid, log: join(this.place, `${name}.log`), startMs, stop };
  }

  startHelper(name, file, options = {}) {
    return startHelper(this.processes, name, join(root, 'bench', file), { onExit: this.ending.onExit, ...options });
  }
}
