import { eventually } from '../support/eventually';
import { OwnRedis } from '../support/own-redis';
import { TcpProxy } from '../support/tcp-proxy';
import { groupIsAlive, TestSystem } from '../support/test-system';

const SLOTS = 16384;
const urls = (servers: OwnRedis[]) => servers.map(({ url }) => url).join(',');

/** Cancels a running and a waiting job, runs `fail`, cancels two more, and checks what became of them all. */
async function failOver(system: TestSystem, fail: () => Promise<unknown>) {
  const running = [await system.createRunning('cooperative'), await system.createRunning('cooperative')] as const;
  const [before, during, kept] = [
    await system.create('quick'),
    await system.create('quick'),
    await system.create('quick'),
  ];
  expect((await system.cancel(before.id)).status).toBe(200);
  const failed = fail();
  expect((await system.cancel(during.id)).status).toBe(200);
  expect((await system.cancel(running[0].job.id)).status).toBe(200);
  expect((await system.cancel(running[1].job.id)).status).toBe(200);
  await failed;
  for (const { job, pid } of running) {
    await system.untilStopped(job.id);
    expect(await groupIsAlive(pid)).toBe(false);
  }
  await system.untilStatus(kept.id, 'completed');
  for (const { id } of [before, during]) {
    expect(await system.row(id)).toMatchObject({ status: 'cancelled', started_at: null, attempt: 0 });
  }
  await untilDoorbellWorks(system);
}

function untilDoorbellWorks(system: TestSystem) {
  return eventually(
    'a cancel comes by the doorbell',
    async () => {
      const { job } = await system.createRunning('cooperative');
      expect((await system.cancel(job.id)).status).toBe(200);
      await system.untilStopped(job.id);
      const stopping = system.workers[0]!.logged('stopping: the job was cancelled', job.id);
      return stopping?.source === 'doorbell';
    },
    60_000,
  );
}

describe('Redis Sentinel', () => {
  let servers: OwnRedis[];
  let sentinels: OwnRedis[];
  let system: TestSystem;
  beforeAll(async () => {
    const master = await OwnRedis.start();
    const replica = await OwnRedis.start(['--replicaof', '127.0.0.1', String(master.port)]);
    servers = [master, replica];
    sentinels = await Promise.all([1, 2, 3].map(() => OwnRedis.startSentinel(master)));
    await eventually('the sentinels know each other and the replica', async () => {
      const known = await Promise.all(sentinels.map((sentinel) => sentinel.command('sentinel', 'master', 'mymaster')));
      return known.every((fields) => /num-slaves,1,num-other-sentinels,2/.test(String(fields)));
    });
    system = await TestSystem.start({
      redisUrl: master.url,
      settings: { REDIS_MODE: 'sentinel', REDIS_URL: urls(sentinels), WORKER_CONCURRENCY: '2' },
    });
  });
  afterAll(async () => {
    await system.stop();
    await Promise.all([...sentinels, ...servers].map((each) => each.stop()));
  });

  it('the doorbell rings', () => untilDoorbellWorks(system));

  it('the master is killed: no accepted cancel is lost, and the work goes on at the new one', async () => {
    await failOver(system, async () => {
      await servers[0]!.kill();
      await eventually('the replica is the master', async () =>
        String(await servers[1]!.command('role')).startsWith('master'),
      );
    });
  }, 120_000);

  it('the master is changed while it lives: nor is any lost then', async () => {
    await servers[0]!.launch();
    const isMaster = async (server: OwnRedis) => String(await server.command('role')).startsWith('master');
    await eventually('the one that was killed is a replica in sync', async () =>
      String(await servers[0]!.command('info', 'replication')).includes('master_link_status:up'),
    );
    await failOver(system, async () => {
      await eventually(
        'the sentinels agree to change',
        async () => {
          await sentinels[0]!.command('sentinel', 'failover', 'mymaster');
          return true;
        },
        60_000,
      );
      await eventually(
        'they have changed',
        async () => (await isMaster(servers[0]!)) && !(await isMaster(servers[1]!)),
      );
    });
  }, 120_000);
});

describe('Redis Cluster', () => {
  let masters: OwnRedis[];
  let replicas: OwnRedis[];
  let toPostgres: TcpProxy;
  let system: TestSystem;
  beforeAll(async () => {
    const flags = ['--cluster-enabled', 'yes', '--cluster-node-timeout', '1000'];
    const servers = await Promise.all(Array.from({ length: 6 }, () => OwnRedis.start(flags)));
    [masters, replicas] = [servers.slice(0, 3), servers.slice(3)];
    await formCluster(masters, replicas);
    toPostgres = await TcpProxy.start(process.env.TEST_POSTGRES_URL!);
    system = await TestSystem.start({
      redisUrl: masters[0]!.url,
      worker: ({ DATABASE_URL }) => ({ DATABASE_URL: toPostgres.through(DATABASE_URL!) }),
      settings: { REDIS_MODE: 'cluster', REDIS_URL: urls(masters), WORKER_CONCURRENCY: '2' },
    });
  }, 120_000);
  afterAll(async () => {
    await system.stop();
    await toPostgres.stop();
    await Promise.all([...masters, ...replicas].map((each) => each.stop()));
  });

  /** The master that holds the queue and the channels: all their keys have the same part in braces. */
  const homeOfQueue = async () => {
    const slot = Number(await masters[0]!.command('cluster', 'keyslot', system.settings.QUEUE_PREFIX!));
    return Math.min(Math.floor(slot / Math.ceil(SLOTS / 3)), 2);
  };

  it('the doorbell rings, as a sharded message', async () => {
    await untilDoorbellWorks(system);
    const home = masters[await homeOfQueue()]!;
    expect(await home.command('pubsub', 'shardchannels')).toHaveLength(1);
    expect(await home.command('pubsub', 'channels')).toEqual([]);
  });

  it('the doorbell is enough, for a worker that cannot ask Postgres', async () => {
    const { job, pid } = await system.createRunning('cooperative');
    toPostgres.silence();
    expect((await system.cancel(job.id)).status).toBe(200);
    await eventually('the task is dead', async () => !(await groupIsAlive(pid)));
    expect(await system.row(job.id)).toMatchObject({ stopped_at: null });
    toPostgres.clear();
    await system.untilStopped(job.id);
  });

  it('the reconciler rebuilds the queue after it was wiped', async () => {
    const busy = [await system.createRunning('cooperative'), await system.createRunning('cooperative')];
    const { id } = await system.create('quick');
    await masters[await homeOfQueue()]!.command('flushall');
    for (const { job } of busy) await system.cancel(job.id);
    await system.untilStatus(id, 'completed');
  });

  it('the master with the queue is killed: no accepted cancel is lost, and its replica goes on', async () => {
    const home = await homeOfQueue();
    await failOver(system, async () => {
      await masters[home]!.kill();
      await eventually('its replica is a master', async () =>
        String(await replicas[home]!.command('role')).startsWith('master'),
      );
    });
  }, 120_000);
});

async function formCluster(masters: OwnRedis[], replicas: OwnRedis[]) {
  const share = Math.ceil(SLOTS / masters.length);
  for (const [index, master] of masters.entries()) {
    const last = Math.min((index + 1) * share, SLOTS) - 1;
    await master.command('cluster', 'addslotsrange', String(index * share), String(last));
  }
  const everyone = [...masters, ...replicas];
  for (const each of everyone) await masters[0]!.command('cluster', 'meet', '127.0.0.1', String(each.port));
  const hears = async (each: OwnRedis, words: string) => String(await each.command('cluster', 'info')).includes(words);
  const all = async (words: string) => (await Promise.all(everyone.map((each) => hears(each, words)))).every(Boolean);
  await eventually('all know each other', () => all(`cluster_known_nodes:${everyone.length}`));
  for (const [index, replica] of replicas.entries()) {
    await replica.command('cluster', 'replicate', String(await masters[index]!.command('cluster', 'myid')));
  }
  await eventually('the cluster is up', () => all('cluster_state:ok'));
  await eventually('the replicas have their copies', async () => {
    const roles = await Promise.all(replicas.map((each) => each.command('role')));
    return roles.every((role) => String(role).includes('connected'));
  });
}
