import { type Server, type ServerResponse } from 'node:http';
import { type Socket } from 'node:net';
import { type Logger } from '../infrastructure/logger';

/** The state of a client's connection. */
export type Connection = {
  /** The responses still to be sent, in the order of their requests; each maps to the one before it. */
  unanswered: Map<ServerResponse, ServerResponse | undefined>;
  newest?: ServerResponse;
  /** Whether the client has been told that what it sent is not a valid request. */
  refused: boolean;
};

/**
 * A connection with more unanswered requests than this is cut: they wait in memory before any key is checked. Clients
 * that pipeline send a few dozen.
 */
const MOST_UNANSWERED = 256;
/** How often connections are checked while the server closes. */
const LOOK_EVERY_MS = 50;
/** How long a closing server waits for requests that have not arrived in full. */
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
    // Runs before Fastify sees the request.
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
   * Calls `handle` when this response's turn has come: once the one before it on its connection, and so every earlier
   * one, has been answered. Otherwise a GET sent right behind a DELETE could still find the job unchanged. If the
   * connection has ended by then, `handle` is never called: Node would not release what it prepares for an answer that
   * nobody gets, such as an open file.
   */
  inTurn(response: ServerResponse, handle: () => void): void {
    const { socket } = response.req;
    const unanswered = this.open.get(socket)?.unanswered;
    const before = unanswered?.get(response);
    if (!before || !unanswered?.has(before)) handle();
    else before.once('close', () => !socket.destroyed && handle());
  }

  /**
   * Whether this answer is the last on its connection. If so, the answer must say so, or the caller's next request
   * would be lost. The answer to a request that has not arrived in full is never the last.
   */
  endsWith(response: ServerResponse): boolean {
    if (!this.closing || !response.req.complete) return false;
    return this.open.get(response.req.socket)?.newest === response;
  }

  /**
   * Lets a closing server end: each connection once its requests have been answered or have failed to arrive, and all
   * connections after `limitMs`. By itself Node would wait without limit for connections that send nothing and for
   * requests that do not arrive in full, and for a connection that was busy at the time as long as it is kept alive.
   */
  endWithin(limitMs: number, server: Server): void {
    this.closing = true;
    const began = performance.now();
    const look = () => {
      const waited = performance.now() - began;
      for (const [socket, { unanswered, newest }] of this.open) {
        // If a connection is closed while unread bytes arrive, the client can see its end before the last answer.
        const isArriving = newest?.req.complete === false;
        if (waited > limitMs || (isArriving ? waited > ARRIVAL_MS : unanswered.size === 0)) socket.destroy();
      }
    };
    look();
    const timer = setInterval(look, LOOK_EVERY_MS);
    server.once('close', () => clearInterval(timer));
  }
}
