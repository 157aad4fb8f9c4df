import { constants } from 'node:os';
import { type INestApplication } from '@nestjs/common';
import { type Logger } from './logger';

const SIGNALS = ['SIGINT', 'SIGTERM'] as const;
/** A signal repeated within this time counts once: npm forwards what the terminal has already sent to every process. */
const SAME_MS = 500;
/** How long to wait for the signal to end the process: it does not end the first process of a container. */
const SIGNAL_MS = 100;

/**
 * Ends the process gently on the first signal: Nest closes the application part by part. A second signal ends it at
 * once. Either way the signal is raised again at the end, so that the exit status shows it. The function returned says
 * whether a signal has come.
 */
export function closeOnSignal(app: INestApplication, logger: Logger): () => boolean {
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
  return () => first !== undefined;
}
