import 'reflect-metadata';
import { readSettings } from './config/settings';
import { startProcess } from './http/start-process';
import { WorkerLifecycle } from './modules/scenario-jobs/worker/worker-lifecycle';
import { WorkerModule } from './worker.module';

const settings = readSettings();
void startProcess('worker', WorkerModule, settings, settings.WORKER_PORT, {
  listening: (app) => app.get(WorkerLifecycle).start(),
});
