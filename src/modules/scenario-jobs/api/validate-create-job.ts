import { type PipeTransform } from '@nestjs/common';
import { getMetadataStorage, validateSync, type ValidationError } from 'class-validator';
import { ApiError, type ApiErrorCode } from '../../../http/api-error';
import { truncate } from '../../../infrastructure/text';
import { CreateJobDto } from './create-job.dto';

/** Fields of the API that are not built yet. Accepting and ignoring them would silently lose a callback. */
const UNSUPPORTED = new Set(['callback_url', 'callback_headers']);
const KNOWN = new Set(
  getMetadataStorage()
    .getTargetValidationMetadatas(CreateJobDto, '', true, false)
    .map(({ propertyName }) => propertyName),
);
/** How much of an unknown field's name the error repeats. */
const MAX_NAME = 100;
/** If a field breaks several rules, the first of these is reported. */
const RULES = ['isDefined', 'isString', 'isNotEmpty', 'isStorableText', 'isEmail', 'maxLength'];

/**
 * A checked body of the create operation. With a `fault` it can create nothing; but if the workspace has already used
 * its valid `requestId`, the answer is that job, whatever the other fields.
 */
export type CheckedBody = { job: CreateJobDto; requestId: string | null; fault: ApiError | undefined };

/** Checks the text of a body, if it could be read. Errors name the field and the rule, one fault at a time. */
export class ValidateCreateJob implements PipeTransform<string | ApiError | undefined, CheckedBody> {
  transform(text: string | ApiError | undefined): CheckedBody {
    if (text instanceof ApiError) throw text;
    const body = parse(text ?? '{}');
    // Not with class-transformer, which follows nested values until the stack overflows. Nor is `__proto__` copied.
    const known = [...KNOWN].filter((name) => Object.hasOwn(body, name)).map((name) => [name, body[name]] as const);
    const job = Object.assign(new CreateJobDto(), Object.fromEntries(known));
    const faults = validateSync(job);
    const isUsable = !faults.some(({ property }) => property === 'request_id');
    return {
      job,
      requestId: isUsable ? (job.request_id ?? null) : null,
      fault: firstUnknownField(body) ?? (faults[0] && describe(faults[0])),
    };
  }
}

function parse(text: string): Record<string, unknown> {
  let body: unknown;
  try {
    body = JSON.parse(text);
  } catch {
    throw new ApiError('invalid_json', 'Request body is not valid JSON');
  }
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    throw new ApiError('invalid_json', 'Request body must be a JSON object');
  }
  return body as Record<string, unknown>;
}

function firstUnknownField(body: Record<string, unknown>): ApiError | undefined {
  for (const name of Object.keys(body)) {
    if (!UNSUPPORTED.has(name) && !KNOWN.has(name)) {
      return new ApiError('unknown_field', `${truncate(name, MAX_NAME)} is not a known field`);
    }
    if (UNSUPPORTED.has(name) && body[name] !== null) {
      return new ApiError('unsupported_field', `${name} is not supported yet`);
    }
  }
  return undefined;
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
