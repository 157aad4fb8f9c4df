import { isUtf8 } from 'node:buffer';
import { randomUUID } from 'node:crypto';
import { type IncomingMessage } from 'node:http';
import { type Socket } from 'node:net';
import { finished } from 'node:stream/promises';
import { FastifyAdapter } from '@nestjs/platform-fastify';
import { type FastifyReply, type FastifyRequest, LogController } from 'fastify';
import { holdsApiKey } from '../auth/api-key';
import { type Caller, type PresentedKey } from '../auth/caller';
import { type Logger } from '../infrastructure/logger';
import { type Metrics } from '../infrastructure/metrics';
import { ApiError } from './api-error';
import { refusalOf, refuseConnection } from './client-errors';
import { Connections } from './connections';
import { sendError, toApiError } from './error.filter';
import { headerValues } from './header-values';
import { PROBES } from './probes';

/** Twelve bytes for each of the 60 000 characters of the largest prompt and context, and some air. */
const BODY_LIMIT = 1024 * 1024;
/** A request has to be complete after so long; nobody keeps a connection by sending slowly. */
const REQUEST_TIMEOUT_MS = 15_000;
/** How often that is looked at; Node does it every 30 s by itself, and a body could take as much longer. */
const TIMEOUT_CHECK_MS = 1000;
/** Nothing that a request needs may take longer than this, its own arrival included. */
const HANDLER_TIMEOUT_MS = 25_000;
const REQUEST_ID = /^[\w.:/+=-]{1,128}$/;
/** RFC 9110: a name or an address, and perhaps a port. */
const HOST = /^(\[[0-9a-f:.]+\]|[\w.~!$&'()*+,;=%-]*)(:\d*)?$/i;
const METHODS_WITH_BODY = new Set(['POST', 'PUT', 'PATCH']);
const JSON_TYPE = /^application\/json[ \t]*(;|$)/i;
const OTHER_CHARSET = /;[ \t]*charset=(?!"?utf-8"?[ \t]*(;|$))/i;
/** How long the rest of a body that is too large is read and dropped: a sender who is cut off might never read why. */
const LINGER_MS = 5000;

/**
 * The HTTP server of both processes: Fastify, set up so that every answer has a request id and every error
 * is in the envelope, also those that Fastify or Node find before a route is reached.
 */
export function createHttpServer(logger: Logger, metrics: Metrics): FastifyAdapter {
  const connections = new Connections();
  const adapter = new FastifyAdapter({
    loggerInstance: logger,
    bodyLimit: BODY_LIMIT,
    requestTimeout: REQUEST_TIMEOUT_MS,
    http: {
      // Node takes the larger of the two for the whole request, and its own 60 s would be that.
      headersTimeout: REQUEST_TIMEOUT_MS,
      connectionsCheckingInterval: TIMEOUT_CHECK_MS,
      // Node would answer a request without a Host by itself, in words that are not ours: see below.
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
      reply.raw.once('close', () => report(request, reply, metrics));
      sendError(reply.header('x-request-id', request.id), error);
    },
  });
  const fastify = adapter.getInstance();
  const { server } = fastify;
  connections.watch(server);
  // Whoever has said all that he will, and still reads, gets his answer. (A property of Node's that its types lack.)
  Object.assign(server, { httpAllowHalfOpen: true });
  // Node would drop the 2001st and all after it, and say nothing. 16 KiB is the limit of all of them.
  server.maxHeadersCount = 0;
  // Node would drop it without an answer. It has taken its own listeners away: an error nobody hears would end the process.
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

  // Whatever its type, a body is read and no more, also where none is due: what turns out to be malformed must have no
  // effect. What is wrong with it the handler says, once the key has been checked: others learn nothing.
  fastify.removeAllContentTypeParsers();
  fastify.addContentTypeParser('*', { parseAs: 'buffer' }, (request, body: Buffer, done) => {
    done(null, METHODS_WITH_BODY.has(request.method) && body.length > 0 ? textOf(request, body) : undefined);
  });

  fastify.addHook('onRequest', (request, reply, done) => {
    void reply.header('x-request-id', request.id);
    // Node reads no further on a connection that asks for another protocol: the next request would wait for ever.
    if (request.headers.upgrade !== undefined) void reply.header('connection', 'close');
    const { headers, method } = request.raw;
    // Fastify would refuse a type that it cannot read, whether or not there is a body, and a QUERY without one.
    if (headers['content-type'] !== undefined || method === 'QUERY')
      headers['content-type'] = 'application/octet-stream';
    done(faultInHost(request.raw));
  });
  fastify.addHook('onRequest', (_request, reply, done) => {
    const earlier = connections.unansweredBefore(reply.raw);
    if (earlier) earlier.once('close', () => done());
    else done();
  });
  // Not `onResponse`: that does not come when the caller has hung up, and what was done for him is done.
  fastify.addHook('onSend', (request, reply, _payload, done) => {
    // A broken connection is destroyed at once, and its response only when the loop has come round.
    if (reply.raw.destroyed || reply.raw.socket?.destroyed) report(request, reply, metrics);
    else reply.raw.once('close', () => report(request, reply, metrics));
    done();
  });
  fastify.addHook('onSend', (request, reply, _payload, done) => {
    if (connections.endsWith(reply.raw)) void reply.header('connection', 'close');
    if (reply.statusCode === 413 && !isUnwanted(request.raw)) void arrived(request.raw, LINGER_MS).then(() => done());
    else done();
  });
  fastify.addHook('preClose', (done) => {
    connections.endWithin(HANDLER_TIMEOUT_MS, server);
    done();
  });
  return adapter;
}

/** The text of a JSON body, or what is wrong with it. */
function textOf(request: FastifyRequest, body: Buffer): string | ApiError {
  const [type = '', another] = headerValues(request.raw, 'content-type');
  if (!JSON_TYPE.test(type) || OTHER_CHARSET.test(type) || another !== undefined) {
    return new ApiError('unsupported_media_type', 'Content-Type must be application/json, in UTF-8');
  }
  const hasOther = (header: string, coding: string) =>
    headerValues(request.raw, header).some((value) => value.toLowerCase() !== coding);
  if (hasOther('content-encoding', 'identity')) {
    return new ApiError('unsupported_media_type', 'Content-Encoding is not supported');
  }
  // Node reads what is chunked, whatever else has been done to it.
  if (hasOther('transfer-encoding', 'chunked')) {
    return new ApiError('unsupported_media_type', 'Transfer-Encoding is not supported but for chunked');
  }
  return isUtf8(body) ? body.toString() : new ApiError('invalid_json', 'Request body is not valid UTF-8');
}

function faultInHost(request: IncomingMessage): ApiError | undefined {
  const hosts = headerValues(request, 'host');
  if (hosts.length > 1) return new ApiError('malformed_request', 'The Host header is sent more than once');
  if (hosts.length === 0 && request.httpVersion === '1.1') {
    return new ApiError('malformed_request', 'The Host header is missing');
  }
  return HOST.test(hosts[0] ?? '') ? undefined : new ApiError('malformed_request', 'The Host header is not a host');
}

/** Whether the request waits for leave to send a body, and that is too large: then nothing of it will come. */
function isUnwanted({ headers }: IncomingMessage): boolean {
  return /100-continue/i.test(headers.expect ?? '') && Number(headers['content-length']) > BODY_LIMIT;
}

/** Resolves when all of a request has been received, or has not been within `limitMs`. */
async function arrived(request: IncomingMessage, limitMs: number): Promise<void> {
  if (request.complete) return;
  const signal = AbortSignal.timeout(limitMs);
  await finished(request.resume(), { signal }).catch(() => undefined);
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

/** Counts and logs a request that has been answered, or would have been if its caller had waited. */
function report(request: FastifyRequest, reply: FastifyReply, metrics: Metrics): void {
  const route = request.routeOptions.url ?? 'unmatched';
  const refusal = refusalOf(reply.raw);
  const status = refusal?.status ?? reply.statusCode;
  metrics.httpSeconds.observe({ method: request.method, route, status }, reply.elapsedTime / 1000);
  // The lines of probes would bury the others.
  const level = status >= 500 ? 'error' : PROBES.includes(route) ? 'debug' : 'info';
  const caller = request.caller;
  request.log[level](
    {
      method: request.method,
      route,
      status,
      ms: Math.round(reply.elapsedTime * 100) / 100,
      ...(!reply.raw.writableFinished && !refusal && { unread: true }),
      ...(caller && { workspaceId: caller.workspaceId, keyId: caller.keyId }),
      ...request.logged,
      ...(refusal && { error: refusal.code }),
    },
    'request',
  );
}

declare module 'http' {
  interface IncomingMessage {
    /** Of a request, from when its headers have been read. */
    id?: string;
  }
}

declare module 'fastify' {
  interface FastifyRequest {
    /** Set by the API key guard, or by a handler that looks the key up itself. */
    caller?: Caller;
    /** Set by the API key guard. */
    presentedKey?: PresentedKey;
    /** What an operation adds to the line that is logged for its request. */
    logged?: Record<string, unknown>;
  }
}
