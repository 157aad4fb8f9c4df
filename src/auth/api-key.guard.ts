import { type CanActivate, type ExecutionContext, Injectable } from '@nestjs/common';
import { type FastifyRequest } from 'fastify';
import { ApiError } from '../http/api-error';
import { parseAuthorization } from './api-key';
import { ApiKeyRepository } from './api-key.repository';

/**
 * Lets a request through if its API key is valid and its workspace active, and says who calls. The key is
 * looked up at every request: a revoked one stops working at once.
 */
@Injectable()
export class ApiKeyGuard implements CanActivate {
  constructor(private readonly keys: ApiKeyRepository) {}

  async canActivate(context: ExecutionContext): Promise<boolean> {
    const request = context.switchToHttp().getRequest<FastifyRequest>();
    // Node keeps the first of several Authorization headers; which one was meant is not ours to guess.
    const headers = request.raw.headersDistinct['authorization'] ?? [];
    const key = headers.length === 1 ? parseAuthorization(headers[0]) : undefined;
    const owner = key && (await this.keys.findOwner(key));
    if (!owner) {
      const challenge = headers.length === 0 ? '' : ', error="invalid_token"';
      throw new ApiError('invalid_api_key', 'Invalid or inactive API key', {
        'www-authenticate': `Bearer realm="scenario-studio"${challenge}`,
      });
    }
    const { workspaceActive, ...caller } = owner;
    request.caller = caller;
    if (!workspaceActive) throw new ApiError('workspace_inactive', 'Workspace is inactive');
    return true;
  }
}
