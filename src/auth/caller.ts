import { createParamDecorator, type ExecutionContext } from '@nestjs/common';
import { type FastifyRequest } from 'fastify';

/** Who makes the request: an API key of a workspace. */
export type Caller = NonNullable<FastifyRequest['caller']>;

/** The caller, as a parameter of a handler behind the API key guard. */
export const CurrentCaller = createParamDecorator((_: unknown, context: ExecutionContext): Caller => {
  const { caller } = context.switchToHttp().getRequest<FastifyRequest>();
  if (!caller) throw new Error('CurrentCaller needs the ApiKeyGuard');
  return caller;
});
