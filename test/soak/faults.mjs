import { setTimeout as sleep } from 'node:timers/promises';

/** Longer than WATCHDOG_MS, LOCK_MS and WORKER_LOST_MS. */
const FROZEN_MS = 4500;

const frozen = async (signal, milliseconds) => {
  signal('SIGSTOP');
  await sleep(milliseconds);
  signal('SIGCONT');
};

/** The faults, by name. Each returns once it is over and what it hit runs again. */
const FAULTS = {
  'worker killed': async (world, random, fault) => {
    const worker = random.pick(world.workers);
    await world.kill(worker);
    fault.to = Date.now();
    await world.launchWorker(worker);
  },
  'worker frozen': async (world, random) => {
    const { child, name } = random.pick(world.workers);
    await frozen((signal) => child.kill(signal), FROZEN_MS);
    return name;
  },
  'api killed': async (world, random, fault) => {
    const api = random.pick(world.apis);
    await world.kill(api);
    fault.to = Date.now();
    await world.launchApi(api);
  },
  'Redis frozen': (world) => frozen((signal) => process.kill(world.redisPid(), signal), 2000),
  'Redis restarted': (world) => world.restart('redis', 'SIGTERM', () => world.launchRedis()),
  'Redis emptied': (world) => world.redis('FLUSHALL'),
  'Postgres connections cut': (world) =>
    world.query(
      'SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname IS NOT NULL',
    ),
  'Postgres restarted': (world) => world.restart('postgres', 'SIGINT', () => world.launchPostgres()),
};

/** Injects a fault every few seconds, each kind equally often, until told to stop. */
export class Faults {
  /** The faults so far, with the times at which they began and were over. */
  injected = [];
  #stopped = false;

  constructor(world, random, say) {
    Object.assign(this, { world, random, say });
  }

  start() {
    this.over = this.#injectAll();
    // `stop` reports what goes wrong here.
    this.over.catch(() => undefined);
  }

  async stop() {
    this.#stopped = true;
    await this.over;
  }

  /** Whether any fault was under way between these times, or had ended less than `settleMs` before. */
  hit(from, to, settleMs) {
    return this.injected.some((fault) => fault.from <= to && from <= fault.to + settleMs);
  }

  /** Whether this process was frozen at this time, or until less than `settleMs` before. */
  thawed(process, at, settleMs) {
    return this.injected.some(({ thawed, from, to }) => thawed === process && from <= at && at <= to + settleMs);
  }

  async #injectAll() {
    for (;;) {
      for (const name of this.random.shuffled(Object.keys(FAULTS))) {
        await this.#pause(this.random.between(2000, 5000));
        if (this.#stopped) return;
        const fault = { name, from: Date.now(), to: Infinity };
        this.injected.push(fault);
        fault.thawed = await FAULTS[name](this.world, this.random, fault);
        const over = Date.now();
        // For a killed process the fault is its death; while it starts again, the others have worked.
        if (fault.to === Infinity) fault.to = over;
        this.say(`${name}, all is back after ${((over - fault.from) / 1000).toFixed(1)} s`);
      }
    }
  }

  async #pause(milliseconds) {
    for (const end = Date.now() + milliseconds; Date.now() < end && !this.#stopped;) await sleep(50);
  }
}
