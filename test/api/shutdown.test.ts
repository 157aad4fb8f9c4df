import { parseAnswers, RawConnection } from '../support/raw-http';
import { eventually } from '../support/eventually';
import { TcpProxy } from '../support/tcp-proxy';
import { TestSystem } from '../support/test-system';

const BY_SIGTERM = { code: null, signal: 'SIGTERM' };

describe('an api that is told to end', () => {
  let proxy: TcpProxy;
  let system: TestSystem;
  beforeEach(async () => {
    proxy = await TcpProxy.start(process.env.TEST_POSTGRES_URL!);
    system = await TestSystem.start({
      workers: 0,
      api: ({ DATABASE_URL }) => ({ DATABASE_URL: proxy.through(DATABASE_URL!) }),
    });
  });
  afterEach(async () => {
    await system.stop();
    await proxy.stop();
  });

  it.each([
    ['nothing', ''],
    ['half a request', 'GET /livez HTTP/1.1\r\nHost:'],
    ['a request that was answered', 'GET /livez HTTP/1.1\r\nHost: api\r\n\r\n'],
  ])('does not wait for a connection that has sent %s', async (_, bytes) => {
    const connection = new RawConnection(system.api.url!);
    connection.send(Buffer.from(bytes));
    // Behind it, so that the api has taken both.
    expect((await fetch(`${system.api.url}/livez`)).status).toBe(200);
    system.api.signal('SIGTERM');
    expect(await system.api.ended()).toEqual(BY_SIGTERM);
    await eventually('the connection is closed', () => connection.closed);
  });

  it('answers the request that it has, and one that comes behind it, and then closes the connection', async () => {
    const path = new URL(system.jobsUrl).pathname;
    const connection = new RawConnection(system.api.url!);
    proxy.slow(() => 300);
    connection.send(
      Buffer.from(`GET ${path}/j1o2b3i4d5x6 HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer ${system.key}\r\n\r\n`),
    );
    expect((await fetch(`${system.api.url}/livez`)).status).toBe(200);
    system.api.signal('SIGTERM');
    await eventually('it is closing', async () => !(await fetch(`${system.api.url}/livez`).catch(() => undefined)));
    connection.send(Buffer.from('GET /livez HTTP/1.1\r\nHost: api\r\n\r\n'));
    expect(await system.api.ended()).toEqual(BY_SIGTERM);
    await eventually('the connection is closed', () => connection.closed);
    const { answers } = parseAnswers(connection.received, ['GET', 'GET']);
    expect(answers.map(({ status }) => status)).toEqual([404, 200]);
    for (const { headers } of answers) expect(headers['x-request-id']).toHaveLength(1);
    // The last one says that nothing more is read.
    expect(answers.map(({ headers }) => headers.connection?.[0])).toEqual(['keep-alive', 'close']);
  });

  it('drops a request that does not arrive', async () => {
    const path = new URL(system.jobsUrl).pathname;
    const connection = new RawConnection(system.api.url!);
    const head = `POST ${path} HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer ${system.key}\r\n`;
    connection.send(Buffer.from(`${head}Content-Type: application/json\r\nContent-Length: 90\r\n\r\n{`));
    expect((await fetch(`${system.api.url}/livez`)).status).toBe(200);
    system.api.signal('SIGTERM');
    expect(await system.api.ended()).toEqual(BY_SIGTERM);
    await eventually('the connection is closed', () => connection.closed);
    expect(connection.received.toString()).toBe('');
  });

  it('says with an answer that the connection ends with it', async () => {
    const path = new URL(system.jobsUrl).pathname;
    const connection = new RawConnection(system.api.url!);
    proxy.slow(() => 300);
    connection.send(
      Buffer.from(`GET ${path}/j1o2b3i4d5x6 HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer ${system.key}\r\n\r\n`),
    );
    expect((await fetch(`${system.api.url}/livez`)).status).toBe(200);
    system.api.signal('SIGTERM');
    expect(await system.api.ended()).toEqual(BY_SIGTERM);
    await eventually('the connection is closed', () => connection.closed);
    const [answer] = parseAnswers(connection.received, ['GET']).answers;
    expect(answer).toMatchObject({ status: 404, headers: { connection: ['close'] } });
  });
});
