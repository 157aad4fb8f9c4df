import { randomUUID } from 'node:crypto';
import { STATUS_CODES } from 'node:http';
import { type Socket } from 'node:net';
import { JobNotFound } from '../modules/scenario-jobs/job.errors';
import { ApiError } from './api-error';
import { type Connection } from './connections';
import { toApiError } from './error.filter';

/** What Node says of a connection; the packet, which Fastify's type has wrong, is a buffer. */
type ClientError = Error & { code?: string; rawPacket?: unknown };

/**
 * Node gave up on a connection, on what is no request: answers that in the envelope and closes it. Requests that
 * came before on the same connection are answered first, or their caller would take this for their answer.
 */
export function refuseConnection(error: ClientError, socket: Socket, connection: Connection | undefined): void {
  if (!connection || error.code === 'ECONNRESET' || !socket.writable) return void socket.destroy();
  if (connection.refused) return;
  connection.refused = true;
  const refuse = () => {
    if (!socket.writable) return void socket.destroy();
    const { newest } = connection;
    // The newest request was answered before all of it had arrived: it needs no second answer.
    if (newest && !newest.req.complete && newest.writableEnded) return void socket.end();
    socket.end(refusalOf(error));
  };
  const earlier = [...connection.unanswered].filter(({ req }) => req.complete);
  void Promise.all(earlier.map((response) => new Promise((closed) => response.once('close', closed)))).then(refuse);
}

function refusalOf(error: ClientError): string {
  const refusal = describeClientError(error);
  const body = JSON.stringify(refusal.envelope);
  return (
    `HTTP/1.1 ${refusal.status} ${STATUS_CODES[refusal.status]}\r\n` +
    'Content-Type: application/json; charset=utf-8\r\nConnection: close\r\n' +
    `Content-Length: ${Buffer.byteLength(body)}\r\nX-Request-Id: ${randomUUID()}\r\n\r\n${body}`
  );
}

const MALFORMED = new ApiError('malformed_request', 'Request is not well-formed HTTP');
/** Two expressions, each of linear time: anybody may send 64 KiB of anything. */
const JOB_ID = /^[A-Z]+ [^ \r\n?]*\/jobs\/([^ \r\n?]+)/;
const STRANGE = /[^\x21-\x7e]/;

function describeClientError({ code, rawPacket }: ClientError): ApiError {
  switch (code) {
    case 'HPE_HEADER_OVERFLOW':
      return new ApiError('headers_too_large', 'Request headers are larger than 16 KiB');
    case 'ERR_HTTP_REQUEST_TIMEOUT':
      return new ApiError('request_timeout', 'Request was not received in time');
    case 'HPE_INVALID_URL': {
      // Bytes that no URL has, in the place of a job's id: like any other id that is not one. Not after another request.
      const jobId = JOB_ID.exec(Buffer.isBuffer(rawPacket) ? rawPacket.toString() : '')?.[1];
      return jobId !== undefined && STRANGE.test(jobId) ? toApiError(new JobNotFound(jobId)) : MALFORMED;
    }
    default:
      return MALFORMED;
  }
}
