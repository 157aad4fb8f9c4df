import { randomUUID } from 'node:crypto';
import { type ServerResponse, STATUS_CODES } from 'node:http';
import { type Socket } from 'node:net';
import { type Logger } from '../infrastructure/logger';
import { ApiError } from './api-error';
import { type Connection } from './connections';

/** An error that Node reports for a connection. */
type ClientError = Error & { code?: string };

const refusals = new WeakMap<ServerResponse, ApiError>();

/** The error that was sent instead of this response, because the rest of its request did not arrive properly. */
export const refusalOf = (response: ServerResponse): ApiError | undefined => refusals.get(response);

/**
 * Answers, in the error envelope, when Node gives up on a connection because what arrived is not a valid request, and
 * closes it. Earlier requests on the connection are answered first; otherwise the caller would take this answer for
 * theirs.
 */
export function refuseConnection(
  error: ClientError,
  socket: Socket,
  connection: Connection | undefined,
  logger: Logger,
): void {
  if (!connection || error.code === 'ECONNRESET' || !socket.writable) return void socket.destroy();
  if (connection.refused) return;
  connection.refused = true;
  const refuse = () => {
    if (!socket.writable) return void socket.destroy();
    const refusal = describeClientError(error);
    const begun = connection.newest?.req.complete === false ? connection.newest : undefined;
    if (begun) {
      // This request was answered before all of it had arrived: it needs no second answer.
      if (begun.writableEnded) return void socket.end();
      refusals.set(begun, refusal);
    }
    const requestId = begun?.req.id ?? randomUUID();
    if (!begun) logger.info({ requestId, status: refusal.status, error: refusal.code }, 'not a request');
    socket.end(responseOf(refusal, requestId));
  };
  const earlier = [...connection.unanswered.keys()].filter(({ req }) => req.complete);
  void Promise.all(earlier.map((response) => new Promise((closed) => response.once('close', closed)))).then(refuse);
}

function responseOf(refusal: ApiError, requestId: string): string {
  const body = JSON.stringify(refusal.envelope);
  return (
    `HTTP/1.1 ${refusal.status} ${STATUS_CODES[refusal.status]}\r\n` +
    'Content-Type: application/json; charset=utf-8\r\nConnection: close\r\n' +
    `Content-Length: ${Buffer.byteLength(body)}\r\nX-Request-Id: ${requestId}\r\n\r\n${body}`
  );
}

function describeClientError({ code }: ClientError): ApiError {
  switch (code) {
    case 'HPE_HEADER_OVERFLOW':
      return new ApiError('headers_too_large', 'Request headers are larger than 16 KiB');
    case 'ERR_HTTP_REQUEST_TIMEOUT':
      return new ApiError('request_timeout', 'Request was not received in time');
    default:
      return new ApiError('malformed_request', 'Request is not well-formed HTTP');
  }
}
