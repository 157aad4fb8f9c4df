import { isUtf8 } from 'node:buffer';
import { type IncomingMessage } from 'node:http';
import { finished } from 'node:stream/promises';
import { type FastifyInstance, type FastifyRequest } from 'fastify';
import { ApiError } from './api-error';
import { headerValues } from './header-values';

/** Room for 12 bytes for each of the 60 000 characters of the largest prompt and context, and some to spare. */
export const BODY_LIMIT = 1024 * 1024;
const METHODS_WITH_BODY = new Set(['POST', 'PUT', 'PATCH']);
const JSON_TYPE = /^application\/json[ \t]*(;|$)/i;
const OTHER_CHARSET = /;[ \t]*charset=(?!"?utf-8"?[ \t]*(;|$))/i;
/** How long the rest of a body that is too large is read and dropped: a sender that is cut off might never see why. */
const LINGER_MS = 5000;

/**
 * Has the body of every request read, whatever its type and even where none is expected: a malformed request must have
 * no effect. Errors in the body are reported by the handler, after the key has been checked, so that others learn
 * nothing. A handler therefore receives either the text of a JSON body or the error found in it.
 */
export function readBodies(fastify: FastifyInstance): void {
  fastify.removeAllContentTypeParsers();
  fastify.addContentTypeParser('*', { parseAs: 'buffer' }, (request, body: Buffer, done) => {
    done(null, METHODS_WITH_BODY.has(request.method) && body.length > 0 ? textOf(request, body) : undefined);
  });
  fastify.addHook('onRequest', (request, _reply, done) => {
    const { headers, method } = request.raw;
    // Fastify would refuse a content type that it cannot read, even without a body, and a QUERY without a content type.
    if (headers['content-type'] !== undefined || method === 'QUERY')
      headers['content-type'] = 'application/octet-stream';
    done();
  });
  fastify.addHook('onSend', (request, reply, _payload, done) => {
    if (reply.statusCode === 413 && !isUnwanted(request.raw)) void arrived(request.raw, LINGER_MS).then(() => done());
    else done();
  });
}

/** Whether the request asks for permission to send a body that is too large: such a body never comes. */
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
  // Node decodes a chunked body whatever other transfer codings have been applied to it.
  if (hasOther('transfer-encoding', 'chunked')) {
    return new ApiError('unsupported_media_type', 'Transfer-Encoding is not supported but for chunked');
  }
  return isUtf8(body) ? body.toString() : new ApiError('invalid_json', 'Request body is not valid UTF-8');
}

/** Resolves once the whole request has been received, or after `limitMs`. */
async function arrived(request: IncomingMessage, limitMs: number): Promise<void> {
  if (request.complete) return;
  const signal = AbortSignal.timeout(limitMs);
  await finished(request.resume(), { signal }).catch(() => undefined);
}
