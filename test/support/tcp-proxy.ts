import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';

/** What happens to what one side sends before the other side gets it. */
type Weather =
  | { kind: 'clear' }
  /** Everything arrives later by the delay. */
  | { kind: 'slow'; delayMs: () => number }
  /** Connections stay open but nothing arrives any more, as when a cable is pulled out. */
  | { kind: 'silent' };

/** A real TCP proxy in front of a real server, which can do to connections what networks do. */
export class TcpProxy {
  private readonly connections = new Set<Connection>();
  private weather: Weather = { kind: 'clear' };
  private trap: Trap | undefined;
  private server: Server | undefined;
  private port = 0;

  private constructor(private readonly target: URL) {}

  /** Starts a proxy in front of the server that the URL names. */
  static async start(targetUrl: string): Promise<TcpProxy> {
    const proxy = new TcpProxy(new URL(targetUrl));
    await proxy.accept();
    return proxy;
  }

  /** The URL of something on the server, through this proxy. */
  through(url: string): string {
    const changed = new URL(url);
    changed.host = `127.0.0.1:${this.port}`;
    return changed.href;
  }

  /** From now on everything arrives late, by the milliseconds that the function returns each time. */
  slow(delayMs: () => number): void {
    this.weather = { kind: 'slow', delayMs };
  }

  /** From now on nothing arrives, on old or new connections. */
  silence(): void {
    this.weather = { kind: 'silent' };
    for (const each of this.connections) each.dead = true;
  }

  /** New connections work from now on. Those that were silenced stay silent: the service must notice by itself. */
  clear(): void {
    this.weather = { kind: 'clear' };
  }

  /** Cuts every connection. */
  cut(): void {
    for (const each of this.connections) each.cut();
  }

  /** Cuts every connection and refuses new ones, as a server that is down does. */
  async refuse(): Promise<void> {
    const closed = this.server && once(this.server, 'close');
    this.server?.close();
    this.server = undefined;
    this.cut();
    await closed;
  }

  /** Listens on the proxy's port; after `refuse`, on the same one again. */
  async accept(): Promise<void> {
    this.server = createServer((client) => this.take(client)).listen(this.port, '127.0.0.1');
    await once(this.server, 'listening');
    this.port = (this.server.address() as AddressInfo).port;
  }

  /**
   * Cuts the next connection on which a client sends these bytes: before the server gets them (`asked`), or once the
   * server has answered and before the client gets the answer (`answered`). Resolves when that has happened.
   */
  cutWhenSent(bytes: string, when: 'asked' | 'answered'): Promise<void> {
    return new Promise((done) => (this.trap = { bytes: Buffer.from(bytes), when, done }));
  }

  /**
   * Holds back the server's answer to the next message of a client that contains these bytes. Resolves once the server
   * has answered, with a function that lets the answer pass.
   */
  holdAnswer(bytes: string): Promise<() => void> {
    let pass!: () => void;
    const held = new Promise<void>((resolve) => (pass = resolve));
    return new Promise((answered) => {
      this.trap = { bytes: Buffer.from(bytes), when: 'answered', held, done: () => answered(pass) };
    });
  }

  async stop(): Promise<void> {
    await this.refuse();
  }

  private take(client: Socket): void {
    const server = connect(Number(this.target.port), this.target.hostname);
    const connection = new Connection(client, server);
    connection.dead = this.weather.kind === 'silent';
    this.connections.add(connection);
    void connection.closed.finally(() => this.connections.delete(connection));
    this.carry(connection, client, server, (chunk) => this.spring(connection, chunk));
    this.carry(connection, server, client, () => connection.takeAnswered());
    client.on('close', () => server.destroy());
  }

  /** Carries what `from` sends to `to`, in order, and then its end. */
  private carry(connection: Connection, from: Socket, to: Socket, springs: (chunk: Buffer) => Trap | undefined): void {
    let before = Promise.resolve();
    from.on('data', (chunk: Buffer) => {
      const sprung = springs(chunk);
      sprung?.done();
      if (sprung && !sprung.held) return connection.cut();
      const { weather } = this;
      const wait = sprung?.held ?? (weather.kind === 'slow' ? sleep(weather.delayMs()) : undefined);
      before = before.then(async () => {
        if (wait) await wait;
        if (!connection.dead && to.writable) to.write(chunk);
      });
    });
    from.on('close', () => void before.then(() => !connection.dead && to.destroy()));
  }

  private spring(connection: Connection, chunk: Buffer): Trap | undefined {
    if (!this.trap || !chunk.includes(this.trap.bytes)) return undefined;
    const { trap } = this;
    this.trap = undefined;
    if (trap.when === 'asked') return trap;
    connection.answered = trap;
    return undefined;
  }
}

type Trap = {
  bytes: Buffer;
  when: 'asked' | 'answered';
  /** What is sent is held back until this resolves; without it the connection is cut. */
  held?: Promise<void>;
  done: () => void;
};

class Connection {
  /** Whether nothing passes any more, without either side being told. */
  dead = false;
  /** Set when the server's next answer must not arrive, or not yet. */
  answered: Trap | undefined;
  readonly closed: Promise<unknown>;

  constructor(
    private readonly client: Socket,
    private readonly server: Socket,
  ) {
    for (const socket of [client, server]) {
      socket.setNoDelay(true);
      socket.on('error', () => undefined);
    }
    this.closed = Promise.all([client, server].map((socket) => new Promise((closed) => socket.on('close', closed))));
  }

  takeAnswered(): Trap | undefined {
    const trap = this.answered;
    this.answered = undefined;
    return trap;
  }

  cut(): void {
    this.client.destroy();
    this.server.destroy();
  }
}
