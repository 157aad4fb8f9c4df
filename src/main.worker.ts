import 'reflect-metadata';
import { statSync } from 'node:fs';
import { readSettings } from './config/settings';
import { startProcess } from './http/start-process';
import { WorkerLifecycle } from './modules/scenario-jobs/worker/worker-lifecycle';
import { WorkerModule } from './worker.module';

const settings = readSettings(
  ({ SCENARIO_TASK: path }) => path !== undefined && !isFile(path) && 'SCENARIO_TASK must be the path of a file',
);
void startProcess('worker', WorkerModule, settings, settings.WORKER_PORT, {
  listening: (app) => app.get(WorkerLifecycle).start(),
});

function isFile(path: string): boolean {
  try {
    return statSync(path).isFile();
  } catch {
    return false;
  }
}
