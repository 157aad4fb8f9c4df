import { constants } from 'node:os';
import { type INestApplication } from '@nestjs/common';
import { type Logger } from './logger';

const SIGNALS = ['SIGINT', 'SIGTERM'] as const;
/** The same signal so soon is the same one: npm passes on what the terminal has sent to all. */
const SAME_MS = 500;
/** The first process of a container is not ended by its own signal. */
const SIGNAL_MS = 100;

/**
 * The first signal ends the process gently: Nest closes the application, every part in its turn. A second one
 * ends it at once. Either way the signal is raised again at the end, so that the exit status is honest.
 */
export function closeOnSignal(app: INestApplication, logger: Logger): void {
  let first: { signal: NodeJS.Signals; at: number } | undefined;
  const end = (signal: NodeJS.Signals) => {
    for (const each of SIGNALS) process.removeAllListeners(each);
    logger.flush(() => {
      process.kill(process.pid, signal);
      setTimeout(() => process.exit(128 + constants.signals[signal]), SIGNAL_MS);
    });
  };
  const onSignal = (signal: NodeJS.Signals) => {
    if (first?.signal === signal && performance.now() - first.at < SAME_MS) return;
    if (first) {
      logger.warn({ signal }, 'second signal, ending at once');
      return end(signal);
    }
    first = { signal, at: performance.now() };
    logger.info({ signal }, 'shutting down');
    app.close().then(
      () => {
        logger.info('shut down');
        end(signal);
      },
      (error: unknown) => {
        logger.error({ err: error }, 'shutdown failed');
        logger.flush(() => process.exit(1));
      },
    );
  };
  for (const signal of SIGNALS) process.on(signal, onSignal);
}
