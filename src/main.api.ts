import 'reflect-metadata';
import { ApiModule } from './api.module';
import { readSettings } from './config/settings';
import { serveApiDescription } from './http/openapi';
import { PROBES } from './http/probes';
import { startProcess } from './http/start-process';

const settings = readSettings();
void startProcess('api', ApiModule, settings, settings.PORT, {
  gatheredLog: true,
  prepare(app) {
    app.setGlobalPrefix('rest/v1', { exclude: PROBES });
    serveApiDescription(app);
  },
});
