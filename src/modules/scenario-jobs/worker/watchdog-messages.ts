import { type ProcessTree } from './process-tree';

/** How often the worker shows its watchdog that it lives. */
export const HEARTBEAT_MS = 500;

/** What the worker tells its watchdog. */
export type ToWatchdog =
  { kind: 'heartbeat' } | { kind: 'watch'; tree: ProcessTree } | { kind: 'forget'; tree: ProcessTree };

/** What the watchdog tells its worker. */
export type FromWatchdog =
  /** The watchdog lives, too: the answer to each heartbeat. */
  | { kind: 'heartbeat' }
  /** The watchdog took its worker for dead and killed this run's processes. */
  | { kind: 'killed'; runId: string };
