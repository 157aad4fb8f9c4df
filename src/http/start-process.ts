import { type DynamicModule } from '@nestjs/common';
import { NestFactory } from '@nestjs/core';
import { type NestFastifyApplication } from '@nestjs/platform-fastify';
import { type Settings } from '../config/settings';
import { createLogger, type Logger, NestLogger } from '../infrastructure/logger';
import { Metrics } from '../infrastructure/metrics';
import { closeOnSignal } from '../infrastructure/shutdown';
import { ErrorFilter } from './error.filter';
import { HealthController } from './health.controller';
import { createHttpServer } from './http-server';

type ProcessModule = { of(settings: Settings, logger: Logger, metrics: Metrics): DynamicModule };

type Options = {
  /** Whether log lines are written together, because there are many. */
  gatheredLog?: boolean;
  prepare?: (app: NestFastifyApplication) => void;
  /** Called once the process listens on its port. */
  listening?: (app: NestFastifyApplication) => void;
};

/** Starts a process of the service: its module, and HTTP on `port`. Ends the process if it cannot start. */
export async function startProcess(
  name: string,
  module: ProcessModule,
  settings: Settings,
  port: number,
  { gatheredLog, prepare, listening }: Options = {},
): Promise<void> {
  const logger = createLogger(name, settings, { gathered: gatheredLog });
  const metrics = new Metrics();
  let isClosing = () => false;
  try {
    const app = await NestFactory.create<NestFastifyApplication>(
      module.of(settings, logger, metrics),
      createHttpServer(logger, metrics),
      { bodyParser: false, logger: new NestLogger(logger), abortOnError: false },
    );
    app.useGlobalFilters(new ErrorFilter());
    prepare?.(app);
    isClosing = closeOnSignal(app, logger);
    await app.listen(port, settings.HOST);
    listening?.(app);
    logger.info({ url: await app.getUrl() }, `${name} is listening`);
    // Whoever has just started it sees at once what is missing, and not only when somebody asks `/readyz`.
    await app.get(HealthController).check();
  } catch (error) {
    // A process that is told to end while it starts fails to start.
    if (isClosing()) return;
    logger.fatal({ err: error }, `${name} could not start`);
    process.exitCode = 1;
    setTimeout(() => process.exit(1), 1000).unref();
  }
}
