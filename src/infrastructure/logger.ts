import { type LoggerService } from '@nestjs/common';
import { type Logger, type LoggerOptions, pino } from 'pino';
import { type Settings } from '../config/settings';
import { logOutput } from './log-output';

export type { Logger } from 'pino';

/** Injection token of the process's pino logger. */
export const LOGGER = Symbol('Logger');

const PRETTY = {
  target: 'pino-pretty',
  // Our field `error` is a code and not an error, which would have a line of its own.
  options: { ignore: 'pid', translateTime: 'HH:MM:ss.l', singleLine: true, errorLikeObjectKeys: ['err'] },
};

/** ioredis puts a command that failed into its error: that is the password when it is refused. */
const ARGUMENTS = ['err', 'err.lastNodeError', 'err.aggregateErrors[*]'].map((error) => `${error}.command.args`);
/** pg puts the connection that was lost into its error, with all that it consists of. */
const CONNECTION = 'err.client';
/** Postgres puts the row that it refuses into its error, with all that the caller sent. */
const ROW = ['err.detail', 'err.cause.detail', 'err.meta.driverAdapterError.cause.detail'];

/**
 * One logger for each process: JSON lines, each written at once or, where there are many, gathered; or coloured text
 * with `LOG_FORMAT=pretty`.
 */
export function createLogger(
  service: string,
  settings: Pick<Settings, 'LOG_LEVEL' | 'LOG_FORMAT'>,
  { gathered = false } = {},
): Logger {
  const options: LoggerOptions = {
    level: settings.LOG_LEVEL,
    base: { service, pid: process.pid },
    timestamp: pino.stdTimeFunctions.isoTime,
    redact: { paths: [...ARGUMENTS, CONNECTION, ...ROW], remove: true },
    formatters: { level: (label) => ({ level: label }) },
  };
  if (settings.LOG_FORMAT === 'pretty') return pino(options, pino.transport(PRETTY));
  return pino(options, logOutput({ gathered }));
}

/** Lets Nest's own messages go where ours go. Its chatter about modules and routes is for debugging. */
export class NestLogger implements LoggerService {
  constructor(private readonly logger: Logger) {}

  log(message: unknown, context?: string) {
    this.logger.debug({ context }, String(message));
  }

  warn(message: unknown, context?: string) {
    this.logger.warn({ context }, String(message));
  }

  error(message: unknown, stack?: string, context?: string) {
    this.logger.error({ context, ...(message instanceof Error ? { err: message } : { stack }) }, String(message));
  }

  debug(message: unknown, context?: string) {
    this.logger.debug({ context }, String(message));
  }

  verbose(message: unknown, context?: string) {
    this.logger.trace({ context }, String(message));
  }

  fatal(message: unknown, context?: string) {
    this.logger.fatal({ context }, String(message));
  }
}
