import { type DynamicModule, Global, Module } from '@nestjs/common';
import { SETTINGS_TOKEN, type Settings } from '../config/settings';
import { Database } from './database';
import { LOGGER, type Logger } from './logger';
import { Metrics } from './metrics';

/** What every part of a process may use: its settings, logger and metrics, and Postgres. */
@Global()
@Module({})
export class InfrastructureModule {
  static of(settings: Settings, logger: Logger, metrics: Metrics): DynamicModule {
    const shared = [
      { provide: SETTINGS_TOKEN, useValue: settings },
      { provide: LOGGER, useValue: logger },
      { provide: Metrics, useValue: metrics },
      Database,
    ];
    return { module: InfrastructureModule, providers: shared, exports: shared };
  }
}
