/**
 * The watchdog of one worker process: kills the process trees of the worker's tasks at once when the worker is gone, or
 * when it has been silent for longer than the milliseconds in the first argument. The second argument lists the trees
 * that already run, as JSON. See modules/scenario-jobs/worker/watchdog.ts.
 */
import { killTrees, type ProcessTree } from './modules/scenario-jobs/worker/process-tree';
import { type FromWatchdog, HEARTBEAT_MS, type ToWatchdog } from './modules/scenario-jobs/worker/watchdog-messages';

const [, , watchdogMs, running] = process.argv;
const patience = Math.max(1, Math.round(Number(watchdogMs) / HEARTBEAT_MS));
const trees = new Map((JSON.parse(running as string) as ProcessTree[]).map((tree) => [tree.runId, tree]));
/** Counted in our own ticks, not by the clock: if the whole machine slept, both processes were frozen. */
let silentTicks = 0;
/** Resolves when every tree that was to be killed is dead. */
let killed = Promise.resolve();

process.on('message', (message: ToWatchdog) => {
  silentTicks = 0;
  if (message.kind === 'heartbeat') tell(message);
  if (message.kind === 'watch') trees.set(message.tree.runId, message.tree);
  if (message.kind === 'forget') trees.delete(message.tree.runId);
});

setInterval(() => {
  if (++silentTicks >= patience) killAll();
}, HEARTBEAT_MS);

process.on('disconnect', () => {
  killAll();
  void killed.finally(() => process.exit(0));
});
// The watchdog ends with its worker and not before.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => undefined);

function killAll(): void {
  const doomed = [...trees.values()];
  if (doomed.length === 0) return;
  trees.clear();
  // Sent first: a worker that thaws must not see a task die without knowing why.
  for (const { runId } of doomed) tell({ kind: 'killed', runId });
  killed = Promise.all([killed, killTrees(doomed)]).then(() => undefined);
}

function tell(message: FromWatchdog): void {
  if (process.connected) process.send?.(message, undefined, undefined, () => undefined);
}
