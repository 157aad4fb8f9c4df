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

/** A request must have arrived in full after this long, so that nobody can hold a connection by sending slowly. */
const REQUEST_TIMEOUT_MS = 15_000;
/** How often Node checks that limit. Its default is 30 s, by which a body could exceed the limit. */
const TIMEOUT_CHECK_MS = 1000;
/** Limit for everything that a request needs, its own arrival included. */
const HANDLER_TIMEOUT_MS = 25_000;
const REQUEST_ID = /^[\w.:/+=-]{1,128}$/;
/** A host name or address, and optionally a port (RFC 9110). */
const HOST = /^(\[[0-9a-f:.]+\]|[\w.~!$&'()*+,;=%-]*)(:\d*)?$/i;

/**
 * The HTTP server of both processes: Fastify, set up so that every answer has a request id and every error is in the
 * envelope, including errors that Fastify or Node find before a route is reached.
 */
export function createHttpServer(logger: Logger, metrics: Metrics): FastifyAdapter {
  const connections = new Connections(logger);
  const adapter = new FastifyAdapter({
    loggerInstance: logger,
    bodyLimit: BODY_LIMIT,
    requestTimeout: REQUEST_TIMEOUT_MS,
    http: {
      // Node applies the larger of the two limits to the whole request, and its default here is 60 s.
      headersTimeout: REQUEST_TIMEOUT_MS,
      connectionsCheckingInterval: TIMEOUT_CHECK_MS,
      // Node would answer a request without a Host itself, outside our envelope: see `faultInHost`.
      requireHostHeader: false,
    },
    handlerTimeout: HANDLER_TIMEOUT_MS,
    keepAliveTimeout: 72_000,
    genReqId: requestId,
    logController: new LogController({ disableRequestLogging: true, requestIdLogLabel: 'requestId' }),
    // An id in a path is looked up however long it is, so a long one is simply not found.
    routerOptions: { maxParamLength: 65_536 },
    rewriteUrl: (request: IncomingMessage) => decodable(request.url ?? '/'),
    clientErrorHandler: (error, socket) => refuseConnection(error, socket, connections.get(socket), logger),
    // While the server closes, requests are served as usual; Fastify's own 503 is not in our envelope.
    return503OnClosing: false,
    // Without a route no hooks run, so what the hooks would do is done here.
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

/** Answers what Node would drop, or would answer itself outside our envelope. */
function answerForNode(server: Server, connections: Connections, logger: Logger): void {
  connections.watch(server);
  // A caller that has closed its sending side but still reads gets its answer. (Node's types lack this property.)
  Object.assign(server, { httpAllowHalfOpen: true });
  // By default Node silently drops every header after the 2000th. All headers together are limited to 16 KiB.
  server.maxHeadersCount = 0;
  // Node would drop a CONNECT request without an answer. It has removed its own listeners from the socket, and an error
  // that has no listener would end the process.
  server.on('connect', (request, socket) => {
    socket.on('error', () => socket.destroy());
    refuseConnection(new Error(request.method), socket as Socket, connections.get(socket as Socket), logger);
  });
  // A caller that asks before sending a body that is too large is refused at once.
  server.on('checkContinue', (request, response) => {
    if (!isUnwanted(request)) response.writeContinue();
    server.emit('request', request, response);
  });
  // An expectation that Node does not know is ignored; Node would refuse it outside our envelope.
  server.on('checkExpectation', (request, response) => server.emit('request', request, response));
}

function addHeaders(fastify: FastifyInstance): void {
  fastify.addHook('onRequest', (request, reply, done) => {
    void reply.header('x-request-id', request.id);
    // Node reads no further on a connection that asks for another protocol: the next request on it would wait forever.
    if (request.headers.upgrade !== undefined) void reply.header('connection', 'close');
    done(faultInHost(request.raw));
  });
}

/** Handles the requests of each connection one after the other, and ends each connection after its last answer. */
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

/** The id of a request: the caller's own if it can stand in a log line and contains no key, else a new one. */
function requestId(request: IncomingMessage): string {
  const given = request.headers['x-request-id'];
  request.id = typeof given === 'string' && REQUEST_ID.test(given) && !holdsApiKey(given) ? given : randomUUID();
  return request.id;
}

/** Escapes a path that cannot be decoded, so that it is taken literally and gets the usual 404. */
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
    /** The request's id, set once its headers have been read. */
    id?: string;
  }
}
