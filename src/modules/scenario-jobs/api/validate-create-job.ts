import { type PipeTransform } from '@nestjs/common';
import { plainToInstance } from 'class-transformer';
import { validateSync, type ValidationError } from 'class-validator';
import { ApiError, type ApiErrorCode } from '../../../http/api-error';
import { CreateJobDto } from './create-job.dto';

/** Fields of the API that are not built yet. To accept and ignore them would lose a callback silently. */
const UNSUPPORTED = new Set(['callback_url', 'callback_headers']);

/** Checks the body of the create operation. Its errors name the field and the rule, the first fault first. */
export class ValidateCreateJob implements PipeTransform<unknown, CreateJobDto> {
  transform(body: unknown): CreateJobDto {
    if (body === undefined) body = {};
    if (typeof body !== 'object' || body === null || Array.isArray(body)) {
      throw new ApiError('invalid_json', 'Request body must be a JSON object');
    }
    const job = plainToInstance(CreateJobDto, body);
    const [fault] = validateSync(job, { whitelist: true, forbidNonWhitelisted: true, stopAtFirstError: true });
    if (fault) throw describe(fault);
    return job;
  }
}

function describe({ property, constraints = {} }: ValidationError): ApiError {
  const [rule = '', message = `${property} is invalid`] = Object.entries(constraints)[0] ?? [];
  if (UNSUPPORTED.has(property)) return new ApiError('unsupported_field', `${property} is not supported yet`);
  if (rule === 'whitelistValidation') return new ApiError('unknown_field', `${property} is not a known field`);
  return new ApiError(codeOf(rule, property), message);
}

function codeOf(rule: string, property: string): ApiErrorCode {
  if (rule === 'isDefined') return 'missing_field';
  if (rule === 'isNotEmpty' && property === 'prompt') return 'missing_field';
  if (rule === 'maxLength' && property === 'prompt') return 'prompt_too_long';
  if (rule === 'maxLength' && property === 'context') return 'context_too_long';
  return 'invalid_field';
}
