import { once } from 'node:events';
import { type AddressInfo, createServer, type Socket } from 'node:net';
import { pino } from 'pino';
import { parseSettings } from '../src/config/settings';
import { connectImpatiently, type RedisConnection } from '../src/infrastructure/redis';
import { eventually } from './support/eventually';
import { OwnRedis } from './support/own-redis';

const PASSWORD = 'p@ss/w:rd, 100 %';
/** The first byte of a TLS handshake. */
const HANDSHAKE = 0x16;

let connection: RedisConnection;
afterEach(() => connection.disconnect());

function connect(settings: Record<string, string>): RedisConnection {
  const logger = pino({ level: 'silent' });
  connection = connectImpatiently(parseSettings({ DATABASE_URL: 'postgres://host/db', ...settings }), logger, 1000);
  return connection;
}

describe('what the URL of Redis says', () => {
  const servers: OwnRedis[] = [];
  afterEach(() => Promise.all(servers.splice(0).map((each) => each.stop())));

  async function start(flags: string[] = []): Promise<OwnRedis> {
    const server = await OwnRedis.start(flags);
    servers.push(server);
    await server.command('acl', 'setuser', 'ada', 'on', `>${PASSWORD}`, '~*', '&*', '+@all');
    return server;
  }

  const urlAt = ({ port }: OwnRedis) => `redis://ada:${encodeURIComponent(PASSWORD)}@127.0.0.1:${port}`;

  /** How Redis sees our connection, once we are let in. */
  const whoAmI = (settings: Record<string, string>) => {
    const redis = connect(settings);
    return eventually('Redis lets us in', () => redis.call('client', 'info'));
  };

  it('is whom to log in as, and the database', async () => {
    const REDIS_URL = `${urlAt(await start())}/3`;
    expect(await whoAmI({ REDIS_URL })).toMatch(/ db=3 .* user=ada /);
  });

  it('is the same behind sentinels, which have a password of their own', async () => {
    const sentinel = await OwnRedis.startSentinel(await start());
    servers.push(sentinel);
    await sentinel.command('acl', 'setuser', 'default', 'resetpass', '>secret');
    const settings = { REDIS_MODE: 'sentinel', REDIS_URL: `${urlAt(sentinel)}/3`, REDIS_SENTINEL_PASSWORD: 'secret' };
    expect(await whoAmI(settings)).toMatch(/ db=3 .* user=ada /);
  });

  it('is whom to log in as at the nodes of a cluster', async () => {
    const node = await start(['--cluster-enabled', 'yes', '--cluster-announce-ip', '127.0.0.1']);
    await node.command('cluster', 'addslotsrange', '0', '16383');
    expect(await whoAmI({ REDIS_MODE: 'cluster', REDIS_URL: urlAt(node) })).toMatch(/ user=ada /);
  });
});

describe('a URL of Redis that begins with rediss:', () => {
  it.each(['single', 'sentinel', 'cluster'])('has TLS spoken: %s', async (REDIS_MODE) => {
    const sockets: Socket[] = [];
    const server = createServer((socket) => sockets.push(socket)).listen(0, '127.0.0.1');
    try {
      await once(server, 'listening');
      connect({ REDIS_MODE, REDIS_URL: `rediss://127.0.0.1:${(server.address() as AddressInfo).port}` });
      const [socket] = (await once(server, 'connection')) as [Socket];
      const [heard] = (await once(socket, 'data')) as [Buffer];
      expect(heard[0]).toBe(HANDSHAKE);
    } finally {
      for (const socket of sockets) socket.destroy();
      server.close();
    }
  });

  it('has it spoken with the master that sentinels name, and not only with them', () => {
    const { options } = connect({ REDIS_MODE: 'sentinel', REDIS_URL: 'rediss://127.0.0.1:1' });
    expect(options).toMatchObject({ tls: {}, enableTLSForSentinelMode: true });
  });
});
