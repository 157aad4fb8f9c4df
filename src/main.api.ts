import 'reflect-metadata';
import { NestFactory } from '@nestjs/core';
import { type NestFastifyApplication } from '@nestjs/platform-fastify';
import { ApiModule } from './api.module';
import { readSettings } from './config/settings';
import { ErrorFilter } from './http/error.filter';
import { createHttpServer } from './http/http-server';
import { serveApiDescription } from './http/openapi';
import { createLogger, NestLogger } from './infrastructure/logger';
import { Metrics } from './infrastructure/metrics';
import { closeOnSignal } from './infrastructure/shutdown';
import { JobRepository } from './modules/scenario-jobs/job.repository';

async function main() {
  const settings = readSettings();
  const logger = createLogger('api', settings);
  const metrics = new Metrics();
  const app = await NestFactory.create<NestFastifyApplication>(
    ApiModule.of(settings, logger, metrics),
    createHttpServer(logger, metrics),
    { bodyParser: false, logger: new NestLogger(logger) },
  );
  app.setGlobalPrefix('rest/v1', { exclude: ['livez', 'readyz', 'metrics'] });
  app.useGlobalFilters(new ErrorFilter());
  serveApiDescription(app);
  const jobs = app.get(JobRepository);
  metrics.showJobs(() => jobs.countUnfinished());
  closeOnSignal(app, logger);
  await app.listen(settings.PORT, settings.HOST);
  logger.info({ url: await app.getUrl() }, 'api is listening');
}

void main();
