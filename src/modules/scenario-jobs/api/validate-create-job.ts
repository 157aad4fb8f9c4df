import { type PipeTransform } from '@nestjs/common';
import { getMetadataStorage, validateSync, type ValidationError } from 'class-validator';
import { ApiError, type ApiErrorCode } from '../../../http/api-error';
import { CreateJobDto } from './create-job.dto';

/** Fields of the API that are not built yet. To accept and ignore them would lose a callback silently. */
const UNSUPPORTED = new Set(['callback_url', 'callback_headers']);
const KNOWN = new Set(
  getMetadataStorage()
    .getTargetValidationMetadatas(CreateJobDto, '', true, false)
    .map(({ propertyName }) => propertyName),
);
/** Of several rules that a field breaks, the first of these is told. */
const RULES = ['isDefined', 'isString', 'isNotEmpty', 'isStorableText', 'isEmail', 'maxLength'];

/** Checks the body of the create operation. Its errors name the field and the rule, one fault at a time. */
export class ValidateCreateJob implements PipeTransform<unknown, CreateJobDto> {
  transform(body: unknown): CreateJobDto {
    if (body === undefined) body = {};
    if (typeof body !== 'object' || body === null || Array.isArray(body)) {
      throw new ApiError('invalid_json', 'Request body must be a JSON object');
    }
    for (const name of Object.keys(body)) {
      if (UNSUPPORTED.has(name)) throw new ApiError('unsupported_field', `${name} is not supported yet`);
      if (!KNOWN.has(name)) throw new ApiError('unknown_field', `${name} is not a known field`);
    }
    // Not by class-transformer, which follows nested values until the stack overflows.
    const job = Object.assign(new CreateJobDto(), body);
    const [fault] = validateSync(job);
    if (fault) throw describe(fault);
    return job;
  }
}

function describe({ property, constraints = {} }: ValidationError): ApiError {
  const rule = RULES.find((name) => name in constraints) ?? '';
  return new ApiError(codeOf(rule, property), constraints[rule] ?? `${property} is invalid`);
}

function codeOf(rule: string, property: string): ApiErrorCode {
  if (rule === 'isDefined') return 'missing_field';
  if (rule === 'isNotEmpty' && property === 'prompt') return 'missing_field';
  if (rule === 'maxLength' && property === 'prompt') return 'prompt_too_long';
  if (rule === 'maxLength' && property === 'context') return 'context_too_long';
  return 'invalid_field';
}
