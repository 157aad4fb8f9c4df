import { createParamDecorator, type ExecutionContext } from '@nestjs/common';
import { type FastifyRequest } from 'fastify';

/** Who makes a request: an API key of a workspace. */
export type Caller = { keyId: string; workspaceId: string; workspaceSlug: string };

/** An API key as a request presents it, not yet looked up. */
export type PresentedKey = {
  hash: string;
  /** Looks the key up. Throws the 401 or 403 error if it does not work. */
  identify(): Promise<Caller>;
  /** Records whose key it is, so that the request's log line names the caller. */
  recordCaller(caller: Caller): void;
};

/** The caller, as a parameter of a handler behind the API key guard. */
export const CurrentCaller = setByGuard('caller');

/** The key, as a parameter of a handler that is marked `LooksUpKey`. */
export const CurrentKey = setByGuard('presentedKey');

function setByGuard(property: 'caller' | 'presentedKey') {
  return createParamDecorator((_: unknown, context: ExecutionContext) => {
    const value = context.switchToHttp().getRequest<FastifyRequest>()[property];
    if (!value) throw new Error(`${property} is set by the ApiKeyGuard, which has not run`);
    return value;
  });
}
