import { type ArgumentsHost, Catch, type ExceptionFilter, HttpException, NotFoundException } from '@nestjs/common';
import { type FastifyReply, type FastifyRequest } from 'fastify';
import { isDatabaseUnavailable } from '../infrastructure/database-errors';
import { JobNotCancellable, JobNotFound, RowLocked, ScenarioNotFound } from '../modules/scenario-jobs/job.errors';
import { ApiError } from './api-error';

/** Seconds after which a caller may expect Postgres to be back; long enough for a restart. */
const RETRY_AFTER_S = 2;

/** Turns whatever was thrown into the error envelope: the one place that decides which API error an error becomes. */
@Catch()
export class ErrorFilter implements ExceptionFilter {
  catch(thrown: unknown, host: ArgumentsHost) {
    const http = host.switchToHttp();
    const request = http.getRequest<FastifyRequest>();
    const reply = http.getResponse<FastifyReply>();
    const error = thrown instanceof NotFoundException ? unknownRoute(request) : toApiError(thrown);
    request.logged = {
      ...request.logged,
      error: error.code,
      ...(thrown instanceof JobNotCancellable && { from: thrown.status }),
    };
    const details = { err: thrown, jobId: request.logged.jobId };
    if (error.code === 'internal_error') request.log.error(details, 'unexpected error');
    if (error.code === 'service_unavailable') request.log.warn(details, whyUnavailable(thrown));
    sendError(reply, error);
  }
}

/** The error for a request without a handler: 405 if the path exists under other methods, else 404. */
function unknownRoute(request: FastifyRequest): ApiError {
  const { method, server } = request;
  const [url = ''] = request.url.split('?', 1);
  const where = `${method} ${request.originalUrl.split('?', 1)[0]}`;
  const allowed = server.supportedMethods.filter((one) => {
    const route = server.findRoute({ method: one, url });
    // Fastify's route also matches an empty job id, for which there is no handler.
    return route && !Object.values(route.params).includes('');
  });
  // /docs also throws NotFoundException, for a file that it does not have.
  if (allowed.length === 0 || allowed.includes(method)) {
    return new ApiError('route_not_found', `Route not found: ${where}`);
  }
  return new ApiError('method_not_allowed', `Method not allowed: ${where}`, { allow: allowed.join(', ') });
}

export function sendError(reply: FastifyReply, error: ApiError): void {
  if (reply.sent) return;
  void reply.status(error.status).headers(error.headers).send(error.envelope);
}

export function toApiError(thrown: unknown): ApiError {
  if (thrown instanceof ApiError) return thrown;
  if (thrown instanceof JobNotFound) return new ApiError('job_not_found', thrown.message);
  if (thrown instanceof JobNotCancellable) return new ApiError('job_not_cancellable', thrown.message);
  if (thrown instanceof ScenarioNotFound) return new ApiError('scenario_not_found', thrown.message);
  // Checked first: a caller's broken connection has the same error code as a broken connection to Postgres.
  const refused = fromFramework(thrown);
  if (refused) return refused;
  if (thrown instanceof RowLocked || isDatabaseUnavailable(thrown) || isHandlerTimeout(thrown)) {
    return new ApiError('service_unavailable', 'The service is temporarily unavailable, please try again', {
      'retry-after': String(RETRY_AFTER_S),
    });
  }
  return new ApiError('internal_error', 'An unexpected error occurred');
}

function whyUnavailable(thrown: unknown): string {
  if (thrown instanceof RowLocked) return 'row locked';
  return isHandlerTimeout(thrown) ? 'request took too long' : 'postgres unavailable';
}

function isHandlerTimeout(thrown: unknown): boolean {
  return (thrown as { code?: string } | undefined)?.code === 'FST_ERR_HANDLER_TIMEOUT';
}

/** The error for what Fastify or Nest refused before the request reached our code. */
function fromFramework(thrown: unknown): ApiError | undefined {
  const status =
    thrown instanceof HttpException ? thrown.getStatus() : (thrown as { statusCode?: number } | undefined)?.statusCode;
  if (status === 413) return new ApiError('body_too_large', 'Request body is larger than 1 MiB');
  if (status === 415) return new ApiError('unsupported_media_type', 'Content-Type must be application/json');
  if (status && status < 500) return new ApiError('malformed_request', 'Malformed request');
  return undefined;
}
