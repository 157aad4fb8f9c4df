import { startBehindProxy } from '../support/behind-proxy';
import { eventually } from '../support/eventually';
import { parseAnswers, RawConnection } from '../support/raw-http';
import { type TcpProxy } from '../support/tcp-proxy';
import { type TestSystem } from '../support/test-system';

describe('an api that is told to end', () => {
  let proxy: TcpProxy;
  let system: TestSystem;
  beforeEach(async () => {
    ({ proxy, system } = await startBehindProxy('api', {}, { workers: 0 }));
  });
  afterEach(async () => {
    await system.stop();
    await proxy.stop();
  });

  /** Sends the bytes on a connection of their own and, once the api has received them, tells the api to end. */
  async function sendAndEnd(bytes: string): Promise<RawConnection> {
    const connection = new RawConnection(system.api.url!);
    connection.send(Buffer.from(bytes));
    expect((await fetch(`${system.api.url}/livez`)).status).toBe(200);
    system.api.signal('SIGTERM');
    return connection;
  }

  async function untilEnded(connection: RawConnection): Promise<void> {
    expect(await system.api.ended()).toEqual({ code: null, signal: 'SIGTERM' });
    await eventually('the connection is closed', () => connection.closed);
  }

  const headOf = (method: string, jobPath = '') =>
    `${method} ${new URL(system.jobsUrl).pathname}${jobPath} HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer ${system.key}\r\n`;

  it.each([
    ['nothing', ''],
    ['half a request', 'GET /livez HTTP/1.1\r\nHost:'],
    ['a request that was answered', 'GET /livez HTTP/1.1\r\nHost: api\r\n\r\n'],
  ])('does not wait for a connection that has sent %s', async (_, bytes) => {
    await untilEnded(await sendAndEnd(bytes));
  });

  it('answers the request that it has, and one that comes behind it, and then closes the connection', async () => {
    proxy.slow(() => 300);
    const connection = await sendAndEnd(`${headOf('GET', '/j1o2b3i4d5x6')}\r\n`);
    await eventually('it is closing', async () => !(await fetch(`${system.api.url}/livez`).catch(() => undefined)));
    connection.send(Buffer.from('GET /livez HTTP/1.1\r\nHost: api\r\n\r\n'));
    await untilEnded(connection);
    const { answers } = parseAnswers(connection.received, ['GET', 'GET']);
    expect(answers.map(({ status }) => status)).toEqual([404, 200]);
    for (const { headers } of answers) expect(headers['x-request-id']).toHaveLength(1);
    // The last answer says that nothing more is read.
    expect(answers.map(({ headers }) => headers.connection?.[0])).toEqual(['keep-alive', 'close']);
  });

  it('drops a request that does not arrive', async () => {
    const half = 'Content-Type: application/json\r\nContent-Length: 90\r\n\r\n{';
    const connection = await sendAndEnd(`${headOf('POST')}${half}`);
    await untilEnded(connection);
    expect(connection.received.toString()).toBe('');
    // By the api's own clock, it did not wait as long as a request may take, which is 25 s.
    const [began, ended] = await Promise.all(
      ['shutting down', 'shut down'].map(async (message) => (await system.api.untilLogged(message)).time as string),
    );
    expect(Date.parse(ended!) - Date.parse(began!)).toBeLessThan(20_000);
  });

  it('logs every request that it has answered, and its end, however slowly its lines are read', async () => {
    const { api } = system;
    api.holdReading();
    for (let rest = 1000; rest > 0; rest--) await (await fetch(`${api.url}/nothing`)).text();
    api.signal('SIGTERM');
    api.readOn();
    expect(await api.ended()).toEqual({ code: null, signal: 'SIGTERM' });
    await eventually('its last line is read', () => api.logged('shut down'));
    expect(api.logs.filter(({ msg }) => msg === 'request').length).toBe(1000);
    expect(api.logs.at(-1)).toMatchObject({ msg: 'shut down' });
  });

  it('says with an answer that the connection ends with it', async () => {
    proxy.slow(() => 300);
    const connection = await sendAndEnd(`${headOf('GET', '/j1o2b3i4d5x6')}\r\n`);
    await untilEnded(connection);
    const [answer] = parseAnswers(connection.received, ['GET']).answers;
    expect(answer).toMatchObject({ status: 404, headers: { connection: ['close'] } });
  });
});
