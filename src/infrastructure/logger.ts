import { type LoggerService } from '@nestjs/common';
import { type Logger, pino } from 'pino';
import { prettyFactory } from 'pino-pretty';
import { type Settings } from '../config/settings';
import { logOutput } from './log-output';

export type { Logger } from 'pino';

/** Injection token of the process's pino logger. */
export const LOGGER = Symbol('Logger');

const PRETTY = {
  ignore: 'pid',
  translateTime: 'HH:MM:ss.l',
  singleLine: true,
  // Our field `error` holds a code; pino-pretty would take it for an error and give it a line of its own.
  errorLikeObjectKeys: ['err'],
};

/** ioredis puts the failed command into its error; if a login was refused, that includes the password. */
const ARGUMENTS = ['err', 'err.lastNodeError', 'err.aggregateErrors[*]'].map((error) => `${error}.command.args`);
/** pg puts the lost connection into its error, with everything in it. */
const CONNECTION = 'err.client';
/** Postgres puts the refused row into its error, with everything that the caller sent. */
const ROW = ['err.detail', 'err.cause.detail', 'err.meta.driverAdapterError.cause.detail'];

/**
 * The logger of a process: JSON lines, each written at once or, where there are many, gathered; or coloured text with
 * `LOG_FORMAT=pretty`.
 */
export function createLogger(
  service: string,
  settings: Pick<Settings, 'LOG_LEVEL' | 'LOG_FORMAT'>,
  { gathered = false } = {},
): Logger {
  const format = settings.LOG_FORMAT === 'pretty' ? prettyFactory(PRETTY) : undefined;
  return pino(
    {
      level: settings.LOG_LEVEL,
      base: { service, pid: process.pid },
      timestamp: pino.stdTimeFunctions.isoTime,
      redact: { paths: [...ARGUMENTS, CONNECTION, ...ROW], remove: true },
      formatters: { level: (label) => ({ level: label }) },
    },
    logOutput({ gathered, format }),
  );
}

/** Sends Nest's own messages to our logger, those about modules and routes at debug level. */
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
