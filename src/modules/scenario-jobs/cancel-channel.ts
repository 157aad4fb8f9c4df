import { type Settings } from '../../config/settings';

/**
 * The doorbell: a message to the one worker that runs a cancelled job. It carries no authority: the worker
 * that gets it asks Postgres. Losing it costs time, at most one poll.
 */
export type CancelMessage = { jobId: string; runId: string };

/** The pub/sub channel of one worker. */
export function cancelChannel(settings: Pick<Settings, 'QUEUE_PREFIX'>, workerId: string): string {
  return `${settings.QUEUE_PREFIX}:cancel:${workerId}`;
}
