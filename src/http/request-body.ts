import { isUtf8 } from 'node:buffer';
import { type IncomingMessage } from 'node:http';
import { finished } from 'node:stream/promises';
import { type FastifyInstance, type FastifyRequest } from 'fastify';
import { ApiError } from './api-error';
import { headerValues } from './header-values';

/** Twelve bytes for each of the 60 000 characters of the largest prompt and context, and some air. */
export const BODY_LIMIT = 1024 * 1024;
const METHODS_WITH_BODY = new Set(['POST', 'PUT', 'PATCH']);
const JSON_TYPE = /^application\/json[ \t]*(;|$)/i;
const OTHER_CHARSET = /;[ \t]*charset=(?!"?utf-8"?[ \t]*(;|$))/i;
/** How long the rest of a body that is too large is read and dropped: a sender who is cut off might never read why. */
const LINGER_MS = 5000;

/**
 * Has the body of every request read, whatever its type, also where none is due: what turns out to be malformed must
 * have no effect. What is wrong with it the handler says, once the key has been checked: others learn nothing. So the
 * body that a handler gets is the text of a JSON body, or what is wrong with it.
 */
export function readBodies(fastify: FastifyInstance): void {
  fastify.removeAllContentTypeParsers();
  fastify.addContentTypeParser('*', { parseAs: 'buffer' }, (request, body: Buffer, done) => {
    done(null, METHODS_WITH_BODY.has(request.method) && body.length > 0 ? textOf(request, body) : undefined);
  });
  fastify.addHook('onRequest', (request, _reply, done) => {
    const { headers, method } = request.raw;
    // Fastify would refuse a type that it cannot read, whether or not there is a body, and a QUERY without one.
    if (headers['content-type'] !== undefined || method === 'QUERY')
      headers['content-type'] = 'application/octet-stream';
    done();
  });
  fastify.addHook('onSend', (request, reply, _payload, done) => {
    if (reply.statusCode === 413 && !isUnwanted(request.raw)) void arrived(request.raw, LINGER_MS).then(() => done());
    else done();
  });
}

/** Whether the request waits for leave to send a body, and that is too large: then nothing of it will come. */
export function isUnwanted({ headers }: IncomingMessage): boolean {
  return /100-continue/i.test(headers.expect ?? '') && Number(headers['content-length']) > BODY_LIMIT;
}

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

/** Resolves when all of a request has been received, or has not been within `limitMs`. */
async function arrived(request: IncomingMessage, limitMs: number): Promise<void> {
  if (request.complete) return;
  const signal = AbortSignal.timeout(limitMs);
  await finished(request.resume(), { signal }).catch(() => undefined);
}
