import { ApiProperty, ApiPropertyOptional } from '@nestjs/swagger';
import { IsDefined, isEmail, IsNotEmpty, IsOptional, IsString, ValidateBy } from 'class-validator';
import { isAtMost, isStorable } from '../../../infrastructure/text';

const MAX_PROMPT = 10_000;
const MAX_CONTEXT = 50_000;
/** Of a slug and of a `request_id`. */
const MAX_KEY = 255;

/** An email address. class-validator's own decorator throws on half of a surrogate pair. */
const IsEmailAddress = () =>
  ValidateBy({
    name: 'isEmail',
    validator: {
      validate: (value) => typeof value === 'string' && value.isWellFormed() && isEmail(value),
      defaultMessage: () => '$property must be an email address',
    },
  });

/** Text that Postgres and UTF-8 can hold: no NUL, no half of a surrogate pair. */
const IsStorableText = () =>
  ValidateBy({
    name: 'isStorableText',
    validator: {
      validate: (value) => typeof value !== 'string' || isStorable(value),
      defaultMessage: () => '$property must be valid Unicode text without NUL characters',
    },
  });

/** A limit in characters. class-validator's own decorator leaves some out of its count. */
const MaxCharacters = (most: number) =>
  ValidateBy({
    name: 'maxLength',
    constraints: [most],
    validator: {
      validate: (value) => typeof value !== 'string' || isAtMost(value, most),
      defaultMessage: () => '$property must be at most $constraint1 characters',
    },
  });

const required = { message: '$property is required' };
const text = { message: '$property must be a string' };
const notEmpty = { message: '$property must not be empty' };

/** Body of the create operation. Lengths count characters, not bytes. */
export class CreateJobDto {
  @ApiProperty({ format: 'email', description: 'Email of the user on whose behalf the scenario is created' })
  @IsDefined(required)
  @IsString(text)
  @IsStorableText()
  @IsEmailAddress()
  user_email!: string;

  @ApiProperty({ minLength: 1, maxLength: MAX_PROMPT, description: 'What the scenario is about' })
  @IsDefined(required)
  @IsString(text)
  @IsNotEmpty(required)
  @IsStorableText()
  @MaxCharacters(MAX_PROMPT)
  prompt!: string;

  @ApiPropertyOptional({
    type: String,
    nullable: true,
    maxLength: MAX_CONTEXT,
    description: 'Background material, in Markdown',
  })
  @IsOptional()
  @IsString(text)
  @IsStorableText()
  @MaxCharacters(MAX_CONTEXT)
  context?: string | null;

  @ApiPropertyOptional({
    type: String,
    nullable: true,
    minLength: 1,
    maxLength: MAX_KEY,
    description: 'Slug of a scenario of the workspace to remix',
  })
  @IsOptional()
  @IsString(text)
  @IsNotEmpty(notEmpty)
  @IsStorableText()
  @MaxCharacters(MAX_KEY)
  scenario_slug?: string | null;

  @ApiPropertyOptional({
    type: String,
    nullable: true,
    minLength: 1,
    maxLength: MAX_KEY,
    description: 'Idempotency key: a workspace has at most one job with it',
  })
  @IsOptional()
  @IsString(text)
  @IsNotEmpty(notEmpty)
  @IsStorableText()
  @MaxCharacters(MAX_KEY)
  request_id?: string | null;
}
