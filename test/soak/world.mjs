// What the soak runs on: a Postgres and a Redis of its own, two apis and three workers, each of which it can freeze,
// kill and start again.
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { root } from '../../scripts/prepare.mjs';
import { freePort, startPostgres, startRedis } from '../../scripts/servers.mjs';
import { nodeFlagsOf } from '../../scripts/service.mjs';

const APIS = 2;
export const WORKERS = 3;
/** The built service, or a copy of it with a fault put in. */
const DIST = process.env.SERVICE_DIST ?? join(root, 'dist');
const READY_WITHIN_MS = 60_000;

/** Short times, so that faults outlast them and are repaired within the run. */
export const SETTINGS = {
  NODE_ENV: 'production',
  HOST: '127.0.0.1',
  WORKER_PORT: '0',
  LOG_LEVEL: 'info',
  CANCEL_POLL_MS: '300',
  RECONCILE_MS: '500',
  LOCK_MS: '2000',
  WATCHDOG_MS: '2000',
  BLIND_MS: '2000',
  WORKER_LOST_MS: '3000',
  STOP_ACK_MS: '1000',
  STOP_GRACE_MS: '2000',
  STOP_KILL_MS: '500',
  RETRY_BACKOFF_MS: '100',
  MAX_ATTEMPTS: '50',
  SCENARIO_TASK: fileURLToPath(new URL('soak-task.mjs', import.meta.url)),
  TASK_ENV: 'SOAK_RUNS',
};

export class World {
  apis = [];
  workers = [];
  /** Processes that ended although nobody ended them. */
  unexpected = [];
  #logs = new Set();
  #redisPassword = randomBytes(24).toString('hex');
  #ending = new Set();

  static async start(processes, place) {
    const world = new World();
    Object.assign(world, { processes, place, runsFile: join(place, 'runs.jsonl') });
    writeFileSync(world.runsFile, '');
    const { default: pg } = await import('pg');
    world.postgresPort = await freePort();
    world.redisPort = await freePort();
    const DATABASE_URL = await world.launchPostgres();
    const REDIS_URL = await world.launchRedis();
    world.environment = { ...process.env, ...SETTINGS, DATABASE_URL, REDIS_URL, SOAK_RUNS: world.runsFile };
    world.pool = new pg.Pool({ connectionString: DATABASE_URL, max: 2 });
    world.pool.on('error', () => undefined);
    await world.#run('migrate', 'dist/cli/migrate.js');
    world.key = await world.#run('api-key', 'dist/cli/api-key.js', 'create', '--workspace', 'soak', '--name', 'soak');
    for (let index = 0; index < APIS; index++) world.apis.push({ index, port: await freePort(), down: [] });
    await Promise.all(world.apis.map((api) => world.launchApi(api)));
    for (let index = 0; index < WORKERS; index++) world.workers.push({ index, generation: 0 });
    await Promise.all(world.workers.map((worker) => world.launchWorker(worker)));
    return world;
  }

  launchPostgres() {
    // The soak proves nothing about a power cut, so it need not wait for the disk.
    const flags = ['-c', 'fsync=off', '-c', 'full_page_writes=off'];
    const options = { port: this.postgresPort, flags, onExit: (why) => this.#ended('postgres', why) };
    return startPostgres(this.processes, this.place, options);
  }

  launchRedis() {
    const options = {
      port: this.redisPort,
      password: this.#redisPassword,
      onExit: (why) => this.#ended('redis', why),
    };
    return startRedis(this.processes, this.place, options);
  }

  /** Ends a server and starts it again with what it has on disk. */
  async restart(name, signal, launch) {
    this.#ending.add(name);
    const ended = new Promise((resolve) => (this.whenEnded = resolve));
    process.kill(this.processes.pidOf(name), signal);
    await ended;
    this.#ending.delete(name);
    await launch();
  }

  redisPid() {
    return this.processes.pidOf('redis');
  }

  /** Sends one Redis command on a connection of its own. */
  async redis(command) {
    const { Redis } = await import('ioredis');
    const redis = new Redis(this.environment.REDIS_URL);
    redis.on('error', () => undefined);
    try {
      return await redis.call(command);
    } finally {
      redis.disconnect();
    }
  }

  /** Runs one statement, and repeats it until Postgres answers. */
  async query(statement, values) {
    for (const deadline = Date.now() + READY_WITHIN_MS; ;) {
      try {
        return (await this.pool.query(statement, values)).rows;
      } catch (error) {
        if (Date.now() > deadline) throw error;
        await sleep(100);
      }
    }
  }

  /** Starts an api on its port; `down` records when it could not be reached. */
  async launchApi(api) {
    api.down.push({ from: api.killedAt ?? 0, to: Infinity });
    const name = `api-${api.index}`;
    api.child = this.#launch(name, 'main.api.js', { PORT: String(api.port) });
    api.url = `http://127.0.0.1:${api.port}`;
    await this.#untilLive(name, api.url);
    api.down.at(-1).to = Date.now();
  }

  async launchWorker(worker) {
    const name = `worker-${worker.index}-${++worker.generation}`;
    worker.name = name;
    worker.child = this.#launch(name, 'main.worker.js', {});
    await this.#untilLogged(name, 'worker is listening');
  }

  /** Kills a service with SIGKILL, as the out-of-memory killer does. */
  async kill(service) {
    service.killedAt = Date.now();
    service.child.isKilled = true;
    service.child.kill('SIGKILL');
    if (service.child.signalCode === null) await once(service.child, 'exit');
  }

  /** Every line that the services have logged, in order of time. */
  logLines() {
    return [...this.#logs].flatMap((name) => this.#linesOf(name)).sort((a, b) => a.at - b.at);
  }

  /** The runs that their tasks have reported since this byte of the file. */
  reportedRuns(from) {
    const { size } = statSync(this.runsFile);
    if (size === from) return { runs: [], next: from };
    const text = readFileSync(this.runsFile).subarray(from).toString();
    const whole = text.slice(0, text.lastIndexOf('\n') + 1);
    const runs = whole.split('\n').filter(Boolean);
    return { runs: runs.map((line) => JSON.parse(line)), next: from + Buffer.byteLength(whole) };
  }

  #linesOf(name) {
    const lines = readFileSync(join(this.place, `${name}.log`), 'utf8').split('\n');
    return lines.flatMap((text) => {
      try {
        const line = JSON.parse(text);
        return [{ ...line, process: name, at: Date.parse(line.time) }];
      } catch {
        return []; // Not a log line, or half of one, written by a process that was killed.
      }
    });
  }

  #launch(name, program, environment) {
    this.#logs.add(name);
    const child = this.processes.start(name, process.execPath, [...nodeFlagsOf(program), join(DIST, program)], {
      env: { ...this.environment, ...environment },
      onExit: (why) => {
        if (!child.isKilled) this.unexpected.push(why);
      },
    });
    return child;
  }

  #ended(name, why) {
    if (this.#ending.has(name)) this.whenEnded();
    else this.unexpected.push(why);
  }

  #run(name, program, ...args) {
    return this.processes.run(name, process.execPath, [join(root, program), ...args], { env: this.environment });
  }

  async #untilLive(name, url) {
    for (const deadline = Date.now() + READY_WITHIN_MS; ; await sleep(20)) {
      const live = await fetch(`${url}/livez`).then(
        (response) => response.ok,
        () => false,
      );
      if (live) return;
      if (Date.now() > deadline) throw new Error(`${name} did not listen within ${READY_WITHIN_MS / 1000} s`);
    }
  }

  async #untilLogged(name, message) {
    for (const deadline = Date.now() + READY_WITHIN_MS; ; await sleep(50)) {
      if (this.#linesOf(name).some(({ msg }) => msg === message)) return;
      if (Date.now() > deadline) throw new Error(`${name} did not log "${message}" in ${READY_WITHIN_MS / 1000} s`);
    }
  }
}
