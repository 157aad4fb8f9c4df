import { Controller, Get, Inject, Res } from '@nestjs/common';
import { type FastifyReply } from 'fastify';
import { Database } from '../infrastructure/database';
import { LOGGER, type Logger } from '../infrastructure/logger';
import { within } from '../infrastructure/within';
import { ApiError } from './api-error';

/** Injection token of the function that asks Redis for a sign of life. */
export const PING_REDIS = Symbol('ping Redis');

const PING_LIMIT_MS = 1000;

type State = 'up' | 'down';
type Server = 'postgres' | 'redis';

/** What a load balancer or an orchestrator asks. */
@Controller()
export class HealthController {
  /** What is wrong with a server that is down. */
  private readonly faults = new Map<Server, string>();

  constructor(
    private readonly database: Database,
    @Inject(PING_REDIS) private readonly pingRedis: () => Promise<void>,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {}

  /** The process runs and answers. */
  @Get('livez')
  live() {
    return { status: 'ok' };
  }

  /**
   * The process can do its work. Without Postgres it cannot. Without Redis it can, but slower: jobs wait to be
   * queued and a stop takes a poll instead of a message. That is `degraded`, and still ready.
   */
  @Get('readyz')
  async ready(@Res({ passthrough: true }) reply: FastifyReply) {
    const [postgres, redis] = await Promise.all([
      this.stateOf('postgres', this.database.ping()),
      this.stateOf('redis', this.pingRedis()),
    ]);
    if (postgres === 'up') return { status: redis === 'up' ? 'ok' : 'degraded', postgres, redis };
    reply.status(503);
    const { envelope } = new ApiError('service_unavailable', 'Postgres cannot be reached, or has not been migrated');
    return { status: 'unavailable', postgres, redis, ...envelope };
  }

  /** Logs each new fault once: a process that is not ready gets no requests, whose failures would tell. */
  private async stateOf(server: Server, ping: Promise<void>): Promise<State> {
    try {
      await within(PING_LIMIT_MS, 'ping', ping);
    } catch (error) {
      const fault = String(error);
      if (this.faults.get(server) !== fault) this.logger.warn({ err: error, server }, 'server is down');
      this.faults.set(server, fault);
      return 'down';
    }
    if (this.faults.delete(server)) this.logger.info({ server }, 'server is up again');
    return 'up';
  }
}
