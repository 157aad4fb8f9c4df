import { ApiPropertyOptional, type ApiResponseOptions } from '@nestjs/swagger';
import { API_ERRORS, type ApiErrorCode } from './api-error';

/** The envelope of every error. */
export class ValidationErrorDetail {
  @ApiPropertyOptional({
    type: 'object',
    properties: {
      type: { type: 'string', description: 'Error category (e.g., "invalid_request")' },
      code: { type: 'string', description: 'Specific error code (e.g., "user_not_found")' },
      message: { type: 'string', description: 'Human-readable error message' },
    },
  })
  error!: { type: string; code: string; message: string };
}

/** An error response, with an example. */
export function errorContent(code: ApiErrorCode, message: string) {
  return {
    'application/json': {
      schema: { $ref: '#/components/schemas/ValidationErrorDetail' },
      example: { error: { type: API_ERRORS[code].type, code, message } },
    },
  };
}

/** An error response of an operation. */
export function errorResponse(description: string, code: ApiErrorCode, message: string): ApiResponseOptions {
  return { status: API_ERRORS[code].status, description, content: errorContent(code, message) };
}
