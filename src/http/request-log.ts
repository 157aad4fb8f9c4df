import { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify';
import { type Caller, type PresentedKey } from '../auth/caller';
import { type Metrics } from '../infrastructure/metrics';
import { refusalOf } from './client-errors';
import { PROBES } from './probes';

declare module 'fastify' {
  interface FastifyRequest {
    /** Set by the API key guard, or by a handler that looks the key up itself. */
    caller?: Caller;
    /** Set by the API key guard. */
    presentedKey?: PresentedKey;
    /** What an operation adds to the log line of its request. */
    logged?: Record<string, unknown>;
  }
}

/** Counts and logs every request that reaches a route. */
export function logRequests(fastify: FastifyInstance, metrics: Metrics): void {
  // Not `onResponse`, which does not fire if the caller has hung up; the request may have had its effect anyway.
  fastify.addHook('onSend', (request, reply, _payload, done) => {
    logOnceAnswered(request, reply, metrics);
    done();
  });
}

/** Counts and logs a request once it has been answered, or would have been if its caller had waited. */
export function logOnceAnswered(request: FastifyRequest, reply: FastifyReply, metrics: Metrics): void {
  // A broken connection is destroyed at once, but its response only when the event loop comes round.
  if (reply.raw.destroyed || reply.raw.socket?.destroyed) log(request, reply, metrics);
  else reply.raw.once('close', () => log(request, reply, metrics));
}

function log(request: FastifyRequest, reply: FastifyReply, metrics: Metrics): void {
  const route = request.routeOptions.url ?? 'unmatched';
  const refusal = refusalOf(reply.raw);
  const status = refusal?.status ?? reply.statusCode;
  metrics.httpSeconds.observe({ method: request.method, route, status }, reply.elapsedTime / 1000);
  // Lines about probes would bury the others.
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
