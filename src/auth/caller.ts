import { createParamDecorator, type ExecutionContext } from '@nestjs/common';
import { type FastifyRequest } from 'fastify';

/** Who makes a request: an API key of a workspace. */
export type Caller = { keyId: string; workspaceId: string; workspaceSlug: string };

/** The caller, as a parameter of a handler behind the API key guard. */
export const CurrentCaller = createParamDecorator((_: unknown, context: ExecutionContext): Caller => {
  const { caller } = context.switchToHttp().getRequest<FastifyRequest>();
  if (!caller) throw new Error('CurrentCaller needs the ApiKeyGuard');
  return caller;
});

/** An API key as a request presents it, not yet looked up. */
export type PresentedKey = {
  hash: string;
  /** Looks it up. Throws the 401 or 403 of a key that does not work. */
  identify(): Promise<Caller>;
};

/** The key, as a parameter of a handler that is marked `LooksUpKey`. */
export const CurrentKey = createParamDecorator((_: unknown, context: ExecutionContext): PresentedKey => {
  const { presentedKey } = context.switchToHttp().getRequest<FastifyRequest>();
  if (!presentedKey) throw new Error('CurrentKey needs the ApiKeyGuard');
  return presentedKey;
});
