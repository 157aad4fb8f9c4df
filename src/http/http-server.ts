import { randomUUID } from 'node:crypto';
import { type IncomingMessage, STATUS_CODES } from 'node:http';
import { type Socket } from 'node:net';
import { FastifyAdapter } from '@nestjs/platform-fastify';
import { type FastifyReply, type FastifyRequest, LogController } from 'fastify';
import { type Logger } from '../infrastructure/logger';
import { type Metrics } from '../infrastructure/metrics';
import { JobNotFound } from '../modules/scenario-jobs/job.errors';
import { ApiError } from './api-error';
import { sendError, toApiError } from './error.filter';

/** Twelve bytes for each of the 60 000 characters of the largest prompt and context, and some air. */
const BODY_LIMIT = 1024 * 1024;
/** A request has to be complete after so long; nobody keeps a connection by sending slowly. */
const REQUEST_TIMEOUT_MS = 15_000;
/** Nothing that a request needs may take longer than this, its own arrival included. */
const HANDLER_TIMEOUT_MS = 25_000;
const REQUEST_ID = /^[\w.:/+=-]{1,128}$/;
/** Asked every few seconds by machines: their lines would bury the others. */
const PROBES = new Set(['/livez', '/readyz', '/metrics']);
const METHODS_WITH_BODY = new Set(['POST', 'PUT', 'PATCH']);

/**
 * The HTTP server of both processes: Fastify, set up so that every answer has a request id and every error
 * is in the envelope, also those that Fastify or Node find before a route is reached.
 */
export function createHttpServer(logger: Logger, metrics: Metrics): FastifyAdapter {
  const adapter = new FastifyAdapter({
    loggerInstance: logger,
    bodyLimit: BODY_LIMIT,
    requestTimeout: REQUEST_TIMEOUT_MS,
    // Node looks for requests that take too long every half minute unless told otherwise.
    http: { connectionsCheckingInterval: 1000 },
    handlerTimeout: HANDLER_TIMEOUT_MS,
    keepAliveTimeout: 72_000,
    genReqId: requestId,
    logController: new LogController({ disableRequestLogging: true, requestIdLogLabel: 'requestId' }),
    // The id in a path is looked up however long it is: it is then not found.
    routerOptions: { maxParamLength: 65_536 },
    rewriteUrl: (request: IncomingMessage) => decodable(request.url ?? '/'),
    clientErrorHandler: refuseConnection,
    frameworkErrors: (error: unknown, _request: FastifyRequest, reply: FastifyReply) =>
      sendError(reply, toApiError(error)),
  });
  const fastify = adapter.getInstance();

  // Node would answer an expectation that it does not know by itself, and not in the envelope. It may be ignored.
  fastify.server.on('checkExpectation', (request, response) => fastify.server.emit('request', request, response));

  const routes: { method: string; path: RegExp }[] = [];
  fastify.addHook('onRoute', ({ method, url }) => {
    const path = new RegExp(`^${url.replaceAll('.', '\\.').replaceAll(/:\w+/g, '[^/]+')}$`);
    routes.push(...[method].flat().map((one) => ({ method: one, path })));
  });
  fastify.decorateRequest('allowedMethods', function (this: FastifyRequest) {
    const path = this.url.split('?', 1)[0] ?? '';
    return routes.filter((route) => route.path.test(path)).map((route) => route.method);
  });

  // Nest's own parsers refuse an empty body that claims to be JSON, which DELETE requests of many clients have.
  fastify.removeAllContentTypeParsers();
  fastify.addContentTypeParser('application/json', { parseAs: 'string' }, (request, body, done) => {
    if (!METHODS_WITH_BODY.has(request.method) || body === '') return done(null, undefined);
    try {
      done(null, JSON.parse(body as string));
    } catch {
      done(new ApiError('invalid_json', 'Request body is not valid JSON'));
    }
  });
  fastify.addContentTypeParser('*', (request, payload, done) => {
    if (METHODS_WITH_BODY.has(request.method)) {
      return done(new ApiError('unsupported_media_type', 'Content-Type must be application/json'));
    }
    payload.resume();
    done(null, undefined);
  });

  fastify.addHook('onRequest', (request, reply, done) => {
    void reply.header('x-request-id', request.id);
    // Node reads no further on a connection that asks for another protocol: the next request would wait for ever.
    if (request.headers.upgrade !== undefined) void reply.header('connection', 'close');
    done();
  });
  fastify.addHook('onResponse', (request, reply, done) => {
    const route = request.routeOptions.url ?? 'unmatched';
    const seconds = reply.elapsedTime / 1000;
    metrics.httpSeconds.observe({ method: request.method, route, status: reply.statusCode }, seconds);
    logRequest(request, reply, route);
    done();
  });
  return adapter;
}

/** Takes over the caller's request id if it is one that can stand in a log line, else makes one. */
function requestId(request: IncomingMessage): string {
  const given = request.headers['x-request-id'];
  return typeof given === 'string' && REQUEST_ID.test(given) ? given : randomUUID();
}

/** A path that cannot be decoded is taken literally, so that it is not found like any other unknown path. */
function decodable(url: string): string {
  try {
    decodeURIComponent(url);
    return url;
  } catch {
    return url.replaceAll('%', '%25');
  }
}

function logRequest(request: FastifyRequest, reply: FastifyReply, route: string): void {
  const level = reply.statusCode >= 500 ? 'error' : PROBES.has(route) ? 'debug' : 'info';
  const caller = request.caller;
  request.log[level](
    {
      method: request.method,
      route,
      status: reply.statusCode,
      ms: Math.round(reply.elapsedTime * 100) / 100,
      ...(caller && { workspaceId: caller.workspaceId, keyId: caller.keyId }),
      ...request.logged,
    },
    'request',
  );
}

/** What Node says of a connection; the packet, which Fastify's type has wrong, is a buffer. */
type ClientError = Error & { code?: string; rawPacket?: unknown };

/** Node gave up on a connection before it was a request: answers it in the envelope and closes it. */
function refuseConnection(error: ClientError, socket: Socket): void {
  if (error.code === 'ECONNRESET' || !socket.writable) return void socket.destroy();
  const refusal = describeClientError(error);
  const body = JSON.stringify(refusal.envelope);
  socket.end(
    `HTTP/1.1 ${refusal.status} ${STATUS_CODES[refusal.status]}\r\n` +
      'Content-Type: application/json; charset=utf-8\r\nConnection: close\r\n' +
      `Content-Length: ${Buffer.byteLength(body)}\r\nX-Request-Id: ${randomUUID()}\r\n\r\n${body}`,
  );
}

const MALFORMED = new ApiError('malformed_request', 'Request is not well-formed HTTP');

function describeClientError({ code, rawPacket }: ClientError): ApiError {
  switch (code) {
    case 'HPE_HEADER_OVERFLOW':
      return new ApiError('headers_too_large', 'Request headers are larger than 16 KiB');
    case 'ERR_HTTP_REQUEST_TIMEOUT':
      return new ApiError('request_timeout', 'Request was not received in time');
    case 'HPE_INVALID_URL': {
      // Bytes that no URL has, in the place of a job's id: like any other id that is not one.
      const jobId = /^[A-Z]+ \S*\/jobs\/([^\s?]+)/.exec(Buffer.isBuffer(rawPacket) ? rawPacket.toString() : '')?.[1];
      return jobId === undefined ? MALFORMED : toApiError(new JobNotFound(jobId));
    }
    default:
      return MALFORMED;
  }
}

declare module 'fastify' {
  interface FastifyRequest {
    /** The methods that the request's path exists under. */
    allowedMethods(): string[];
    /** Set by the API key guard. */
    caller?: { keyId: string; workspaceId: string; workspaceSlug: string };
    /** What an operation adds to the line that is logged for its request. */
    logged?: Record<string, unknown>;
  }
}
