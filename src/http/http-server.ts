import { randomUUID } from 'node:crypto';
import { type IncomingMessage, type Server } from 'node:http';
import { type Socket } from 'node:net';
import { FastifyAdapter } from '@nestjs/platform-fastify';
import { type FastifyInstance, type FastifyReply, type FastifyRequest, LogController } from 'fastify';
import { holdsApiKey } from '../auth/api-key';
import { type Logger } from '../infrastructure/logger';
import { type Metrics } from '../infrastructure/metrics';
import { ApiError } from './api-error';
import { refuseConnection } from './client-errors';
import { Connections } from './connections';
import { sendError, toApiError } from './error.filter';
import { headerValues } from './header-values';
import { BODY_LIMIT, isUnwanted, readBodies } from './request-body';
import { logOnceAnswered, logRequests } from './request-log';

/** A request has to be complete after so long; nobody keeps a connection by sending slowly. */
const REQUEST_TIMEOUT_MS = 15_000;
/** How often that is looked at; Node does it every 30 s by itself, and a body could take as much longer. */
const TIMEOUT_CHECK_MS = 1000;
/** Nothing that a request needs may take longer than this, its own arrival included. */
const HANDLER_TIMEOUT_MS = 25_000;
const REQUEST_ID = /^[\w.:/+=-]{1,128}$/;
/** RFC 9110: a name or an address, and perhaps a port. */
const HOST = /^(\[[0-9a-f:.]+\]|[\w.~!$&'()*+,;=%-]*)(:\d*)?$/i;

/**
 * The HTTP server of both processes: Fastify, set up so that every answer has a request id and every error
 * is in the envelope, also those that Fastify or Node find before a route is reached.
 */
export function createHttpServer(logger: Logger, metrics: Metrics): FastifyAdapter {
  const connections = new Connections(logger);
  const adapter = new FastifyAdapter({
    loggerInstance: logger,
    bodyLimit: BODY_LIMIT,
    requestTimeout: REQUEST_TIMEOUT_MS,
    http: {
      // Node takes the larger of the two for the whole request, and its own 60 s would be that.
      headersTimeout: REQUEST_TIMEOUT_MS,
      connectionsCheckingInterval: TIMEOUT_CHECK_MS,
      // Node would answer a request without a Host by itself, in words that are not ours: see `faultInHost`.
      requireHostHeader: false,
    },
    handlerTimeout: HANDLER_TIMEOUT_MS,
    keepAliveTimeout: 72_000,
    genReqId: requestId,
    logController: new LogController({ disableRequestLogging: true, requestIdLogLabel: 'requestId' }),
    // The id in a path is looked up however long it is: it is then not found.
    routerOptions: { maxParamLength: 65_536 },
    rewriteUrl: (request: IncomingMessage) => decodable(request.url ?? '/'),
    clientErrorHandler: (error, socket) => refuseConnection(error, socket, connections.get(socket), logger),
    // A request that comes while the server is closed is one more; the answer of Fastify has another shape.
    return503OnClosing: false,
    // What has no route has no hooks either.
    frameworkErrors: (thrown: unknown, request: FastifyRequest, reply: FastifyReply) => {
      const error = toApiError(thrown);
      request.logged = { error: error.code };
      logOnceAnswered(request, reply, metrics);
      sendError(reply.header('x-request-id', request.id), error);
    },
  });
  const fastify: FastifyInstance = adapter.getInstance();
  answerForNode(fastify.server, connections, logger);
  addHeaders(fastify);
  logRequests(fastify, metrics);
  keepOrder(fastify, connections);
  readBodies(fastify);
  return adapter;
}

/** Answers what Node would drop, or answer by itself in words that are not ours. */
function answerForNode(server: Server, connections: Connections, logger: Logger): void {
  connections.watch(server);
  // A caller who has closed its sending side and still reads gets its answer. (Node's types lack this property.)
  Object.assign(server, { httpAllowHalfOpen: true });
  // Node would drop the 2001st and all after it, and say nothing. 16 KiB is the limit of all of them.
  server.maxHeadersCount = 0;
  // Node would drop it without an answer. It has taken its own listeners away: an error nobody hears would end the
  // process.
  server.on('connect', (request, socket) => {
    socket.on('error', () => socket.destroy());
    refuseConnection(new Error(request.method), socket as Socket, connections.get(socket as Socket), logger);
  });
  // Who asks before sending a body that is too large is told so at once.
  server.on('checkContinue', (request, response) => {
    if (!isUnwanted(request)) response.writeContinue();
    server.emit('request', request, response);
  });
  // An expectation that Node does not know is ignored; it would be refused in words that are not ours.
  server.on('checkExpectation', (request, response) => server.emit('request', request, response));
}

function addHeaders(fastify: FastifyInstance): void {
  fastify.addHook('onRequest', (request, reply, done) => {
    void reply.header('x-request-id', request.id);
    // Node reads no further on a connection that asks for another protocol: the next request would wait for ever.
    if (request.headers.upgrade !== undefined) void reply.header('connection', 'close');
    done(faultInHost(request.raw));
  });
}

/** Handles the requests of one connection one after the other, and ends each connection after its last answer. */
function keepOrder(fastify: FastifyInstance, connections: Connections): void {
  fastify.addHook('onRequest', (_request, reply, done) => {
    connections.inTurn(reply.raw, done);
  });
  fastify.addHook('onSend', (_request, reply, _payload, done) => {
    if (connections.endsWith(reply.raw)) void reply.header('connection', 'close');
    done();
  });
  fastify.addHook('preClose', (done) => {
    connections.endWithin(HANDLER_TIMEOUT_MS, fastify.server);
    done();
  });
}

function faultInHost(request: IncomingMessage): ApiError | undefined {
  const hosts = headerValues(request, 'host');
  if (hosts.length > 1) return new ApiError('malformed_request', 'The Host header is sent more than once');
  if (hosts.length === 0 && request.httpVersion === '1.1') {
    return new ApiError('malformed_request', 'The Host header is missing');
  }
  return HOST.test(hosts[0] ?? '') ? undefined : new ApiError('malformed_request', 'The Host header is not a host');
}

/** Takes over the caller's request id if it is one that can stand in a log line and holds no key, else makes one. */
function requestId(request: IncomingMessage): string {
  const given = request.headers['x-request-id'];
  request.id = typeof given === 'string' && REQUEST_ID.test(given) && !holdsApiKey(given) ? given : randomUUID();
  return request.id;
}

/** A path that cannot be decoded is taken literally; it then gets the usual 404. */
function decodable(url: string): string {
  const [path = '', ...query] = url.split('?');
  try {
    decodeURIComponent(path);
    return url;
  } catch {
    return [path.replaceAll('%', '%25'), ...query].join('?');
  }
}

declare module 'http' {
  interface IncomingMessage {
    /** Of a request, from when its headers have been read. */
    id?: string;
  }
}
