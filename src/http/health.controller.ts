import { Controller, Get, Inject, Res } from '@nestjs/common';
import { type FastifyReply } from 'fastify';
import { Database } from '../infrastructure/database';
import { within } from '../infrastructure/within';
import { ApiError } from './api-error';

/** Injection token of the function that asks Redis for a sign of life. */
export const PING_REDIS = Symbol('ping Redis');

const PING_LIMIT_MS = 1000;

type State = 'up' | 'down';

/** What a load balancer or an orchestrator asks. */
@Controller()
export class HealthController {
  constructor(
    private readonly database: Database,
    @Inject(PING_REDIS) private readonly pingRedis: () => Promise<void>,
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
    const [postgres, redis] = await Promise.all([state(this.database.ping()), state(this.pingRedis())]);
    if (postgres === 'up') return { status: redis === 'up' ? 'ok' : 'degraded', postgres, redis };
    reply.status(503);
    const { envelope } = new ApiError('service_unavailable', 'Postgres cannot be reached, or has not been migrated');
    return { status: 'unavailable', postgres, redis, ...envelope };
  }
}

async function state(ping: Promise<void>): Promise<State> {
  return within(PING_LIMIT_MS, 'ping', ping).then(
    () => 'up',
    () => 'down',
  );
}
