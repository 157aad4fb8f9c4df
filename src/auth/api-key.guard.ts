import { type CanActivate, type ExecutionContext, Injectable } from '@nestjs/common';
import { Reflector } from '@nestjs/core';
import { type FastifyRequest } from 'fastify';
import { ApiError } from '../http/api-error';
import { headerValues } from '../http/header-values';
import { hashApiKey, parseAuthorization } from './api-key';
import { ApiKeyRepository } from './api-key.repository';
import { type Caller } from './caller';

/**
 * Marks a handler whose own SQL statement looks up the key. If the statement finds nothing, the handler calls
 * `identify`.
 */
export const LooksUpKey = Reflector.createDecorator<true>();

/**
 * Lets a request through if its API key is valid and its workspace active, and records the caller. The key is looked up
 * on every request, so a revoked key stops working at once.
 */
@Injectable()
export class ApiKeyGuard implements CanActivate {
  constructor(
    private readonly keys: ApiKeyRepository,
    private readonly reflector: Reflector,
  ) {}

  async canActivate(context: ExecutionContext): Promise<boolean> {
    const request = context.switchToHttp().getRequest<FastifyRequest>();
    // Node keeps only the first of several Authorization headers; we do not guess which one was meant.
    const headers = headerValues(request.raw, 'authorization');
    const key = headers.length === 1 ? parseAuthorization(headers[0]) : undefined;
    if (!key) throw invalidKey(headers.length === 0 ? '' : INVALID_TOKEN);
    const hash = hashApiKey(key);
    request.presentedKey = {
      hash,
      identify: () => this.identify(request, hash),
      recordCaller: (caller) => void (request.caller = caller),
    };
    if (!this.reflector.get(LooksUpKey, context.getHandler())) await request.presentedKey.identify();
    return true;
  }

  private async identify(request: FastifyRequest, hash: string): Promise<Caller> {
    const owner = await this.keys.findOwner(hash);
    if (!owner) throw invalidKey(INVALID_TOKEN);
    const { workspaceActive, ...caller } = owner;
    request.caller = caller;
    if (!workspaceActive) throw new ApiError('workspace_inactive', 'Workspace is inactive');
    return caller;
  }
}

const INVALID_TOKEN = ', error="invalid_token"';

function invalidKey(reason: string): ApiError {
  return new ApiError('invalid_api_key', 'Invalid or inactive API key', {
    'www-authenticate': `Bearer realm="scenario-studio"${reason}`,
  });
}
