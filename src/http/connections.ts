import { type Server, type ServerResponse } from 'node:http';
import { type Socket } from 'node:net';
import { type Logger } from '../infrastructure/logger';

/** What is known of a client's connection. */
export type Connection = {
  /** The answers that are still to be given, in the order of their requests, each with the one before it. */
  unanswered: Map<ServerResponse, ServerResponse | undefined>;
  newest?: ServerResponse;
  /** Whether it has been told that what it sent is no request. */
  refused: boolean;
};

/**
 * A connection with more requests than this still to be answered is cut: they wait in memory, before any key is looked
 * at. Clients that do not wait for each answer send some dozens.
 */
const MOST_UNANSWERED = 256;
/** How often connections are looked at while the server closes. */
const LOOK_EVERY_MS = 50;
/** What has not arrived in full by then is not waited for. */
const ARRIVAL_MS = 2000;

/** The open connections of a server, and which requests of each are still to be answered. */
export class Connections {
  private readonly open = new Map<Socket, Connection>();
  private closing = false;

  constructor(private readonly logger: Logger) {}

  watch(server: Server): void {
    server.on('connection', (socket) => {
      this.open.set(socket, { unanswered: new Map(), refused: false });
      socket.once('close', () => this.open.delete(socket));
    });
    // Before Fastify hears of it.
    server.prependListener('request', ({ socket }, response) => {
      const connection = this.open.get(socket);
      if (!connection) return;
      const { unanswered, newest } = connection;
      connection.newest = response;
      unanswered.set(response, newest);
      if (unanswered.size > MOST_UNANSWERED && !socket.destroyed) {
        this.logger.warn({ unanswered: unanswered.size }, 'connection cut: too many requests at once');
        socket.destroy();
      }
      response.once('close', () => unanswered.delete(response));
    });
  }

  get(socket: Socket): Connection | undefined {
    return this.open.get(socket);
  }

  /**
   * Calls back when it is the turn of the request of this answer: once the one before it on its connection has been
   * answered, and so all before it. Else a GET sent right behind a DELETE could find the job as it was. Never, when the
   * connection has ended by then: what is prepared for an answer that nobody gets, an open file for one, Node would not
   * take back.
   */
  inTurn(response: ServerResponse, handle: () => void): void {
    const { socket } = response.req;
    const unanswered = this.open.get(socket)?.unanswered;
    const before = unanswered?.get(response);
    if (!before || !unanswered?.has(before)) handle();
    else before.once('close', () => !socket.destroyed && handle());
  }

  /**
   * Whether the connection ends with this answer, which must say so: the caller's next request would be lost. An
   * answer to a request that has not arrived in full is never the last thing on a connection.
   */
  endsWith(response: ServerResponse): boolean {
    if (!this.closing || !response.req.complete) return false;
    return this.open.get(response.req.socket)?.newest === response;
  }

  /**
   * Lets a server that is being closed end: each connection once its requests are answered, or do not arrive, and
   * every one after `limitMs`. By itself it would wait, without a limit, for connections that send nothing and for
   * requests that do not arrive in full, and for one that was busy at the time as long as it is kept alive.
   */
  endWithin(limitMs: number, server: Server): void {
    this.closing = true;
    const began = performance.now();
    const look = () => {
      const waited = performance.now() - began;
      for (const [socket, { unanswered, newest }] of this.open) {
        // While bytes come in that nobody reads, the end of a connection can overtake its last answer.
        const isArriving = newest?.req.complete === false;
        if (waited > limitMs || (isArriving ? waited > ARRIVAL_MS : unanswered.size === 0)) socket.destroy();
      }
    };
    look();
    const timer = setInterval(look, LOOK_EVERY_MS);
    server.once('close', () => clearInterval(timer));
  }
}
