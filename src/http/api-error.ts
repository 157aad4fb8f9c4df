/**
 * Every error that this service answers with: its code, HTTP status and type. A test checks the README's table against
 * this one.
 */
export const API_ERRORS = {
  malformed_request: { status: 400, type: 'invalid_request', about: 'The request is not well-formed HTTP.' },
  invalid_json: { status: 400, type: 'invalid_request', about: 'The body is not a JSON object.' },
  missing_field: { status: 400, type: 'invalid_request', about: 'A required field is missing.' },
  invalid_field: { status: 400, type: 'invalid_request', about: 'A field breaks its rule; the message names both.' },
  prompt_too_long: { status: 400, type: 'invalid_request', about: '`prompt` has more than 10 000 characters.' },
  context_too_long: { status: 400, type: 'invalid_request', about: '`context` has more than 50 000 characters.' },
  unknown_field: { status: 400, type: 'invalid_request', about: 'The body has a field that does not exist.' },
  unsupported_field: {
    status: 400,
    type: 'invalid_request',
    about: '`callback_url` and `callback_headers` are not supported yet.',
  },
  invalid_idempotency_key: {
    status: 400,
    type: 'invalid_request',
    about: '`Idempotency-Key` is not 1 to 255 printable ASCII characters, or is sent twice.',
  },
  job_not_cancellable: { status: 400, type: 'invalid_request', about: 'The job is completed, failed or cancelled.' },
  invalid_api_key: {
    status: 401,
    type: 'authentication_error',
    about: 'The API key is missing, malformed, unknown, expired or revoked.',
  },
  workspace_inactive: { status: 403, type: 'authorization_error', about: "The key's workspace is inactive." },
  job_not_found: { status: 404, type: 'not_found', about: 'The workspace has no such job.' },
  scenario_not_found: { status: 404, type: 'not_found', about: '`scenario_slug` names no scenario of the workspace.' },
  route_not_found: { status: 404, type: 'not_found', about: 'There is nothing at this path.' },
  method_not_allowed: { status: 405, type: 'invalid_request', about: 'The path has other methods; see `Allow`.' },
  request_timeout: { status: 408, type: 'invalid_request', about: 'The request was not received in time.' },
  body_too_large: { status: 413, type: 'invalid_request', about: 'The body is larger than 1 MiB.' },
  unsupported_media_type: {
    status: 415,
    type: 'invalid_request',
    about: 'The body is not `application/json` in UTF-8, or is compressed.',
  },
  headers_too_large: { status: 431, type: 'invalid_request', about: 'The headers are larger than 16 KiB.' },
  internal_error: { status: 500, type: 'internal_error', about: 'A fault of the service; its log has the details.' },
  service_unavailable: {
    status: 503,
    type: 'service_unavailable',
    about:
      'Postgres is unavailable or too slow, or a row that the request needs is locked; try again after `Retry-After` seconds.',
  },
} as const;

export type ApiErrorCode = keyof typeof API_ERRORS;

/** The envelope of every error. */
type ErrorEnvelope = { error: { type: string; code: string; message: string } };

/** An error to send to the caller. */
export class ApiError extends Error {
  constructor(
    readonly code: ApiErrorCode,
    message: string,
    readonly headers: Record<string, string> = {},
  ) {
    super(message);
  }

  get status(): number {
    return API_ERRORS[this.code].status;
  }

  get envelope(): ErrorEnvelope {
    return { error: { type: API_ERRORS[this.code].type, code: this.code, message: this.message } };
  }
}
