import { Controller, Get, Inject, Res } from '@nestjs/common';
import { type FastifyReply } from 'fastify';
import { Database } from '../infrastructure/database';
import { isNotMigrated } from '../infrastructure/database-errors';
import { LOGGER, type Logger } from '../infrastructure/logger';
import { within } from '../infrastructure/within';
import { JobQueue } from '../modules/scenario-jobs/job-queue';
import { ApiError } from './api-error';

const PING_LIMIT_MS = 1000;

type State = 'up' | 'down';
type Server = 'postgres' | 'redis';

/** Health checks for load balancers and orchestrators. */
@Controller()
export class HealthController {
  /** The current fault of each server that is down. */
  private readonly faults = new Map<Server, unknown>();

  constructor(
    private readonly database: Database,
    private readonly queue: JobQueue,
    @Inject(LOGGER) private readonly logger: Logger,
  ) {}

  /** Answers as long as the process runs. */
  @Get('livez')
  live() {
    return { status: 'ok' };
  }

  /**
   * Answers whether the process can do its work. Without Postgres it cannot. Without Redis it can, but more slowly:
   * jobs wait to be queued, and a stop waits for a poll instead of a doorbell. That is `degraded`, and still ready.
   */
  @Get('readyz')
  async ready(@Res({ passthrough: true }) reply: FastifyReply) {
    const { postgres, redis } = await this.check();
    if (postgres === 'up') return { status: redis === 'up' ? 'ok' : 'degraded', postgres, redis };
    reply.status(503);
    const why = isNotMigrated(this.faults.get('postgres'))
      ? 'The database has not been migrated'
      : 'Postgres cannot be reached';
    const { envelope } = new ApiError('service_unavailable', why);
    return { status: 'unavailable', postgres, redis, ...envelope };
  }

  /** Asks both servers whether they are there, and logs which is not. */
  async check(): Promise<Record<Server, State>> {
    const [postgres, redis] = await Promise.all([
      this.stateOf('postgres', this.database.ping()),
      this.stateOf('redis', this.queue.ping()),
    ]);
    return { postgres, redis };
  }

  /**
   * The state of a server. Logs a fault when it is not the one before: a process that is not ready gets no requests whose
   * failures would show it.
   */
  private async stateOf(server: Server, ping: Promise<void>): Promise<State> {
    try {
      await within(PING_LIMIT_MS, 'ping', ping);
    } catch (error) {
      if (String(this.faults.get(server)) !== String(error)) this.logger.warn({ err: error, server }, 'server is down');
      this.faults.set(server, error);
      return 'down';
    }
    if (this.faults.delete(server)) this.logger.info({ server }, 'server is up again');
    return 'up';
  }
}
