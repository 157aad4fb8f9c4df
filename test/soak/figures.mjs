import { LOOK_EVERY_MS } from './watch.mjs';

/** A fault counts as hitting a run until this long after it: a frozen worker has to find out what it missed. */
const SETTLE_MS = 2000;

/** What happened, as lines to print. */
export function figures({ jobs, client, watch, faults, rows, logs, begun, seconds }) {
  const cancels = client.requests.filter(({ method }) => method === 'DELETE');
  const stops = stopsOf(cancels, watch, faults);
  const runs = [...begun.values()].flat();
  const ended = logs.filter(({ msg }) => msg === 'run ended');
  return [
    ['jobs', `${jobs.length} asked for, ${rows.length} made; ${counted(rows.map(({ status }) => status))}`],
    ['cancels', counted(cancels.map(outcomeOf))],
    ['stopped', counted(rows.flatMap(({ stopped_how: how }) => how ?? []))],
    ['faults', `${faults.injected.length}: ${counted(faults.injected.map(({ name }) => name))}`],
    ['requests', counted(client.requests.map(({ status }) => status ?? 'broken off'))],
    ['runs', `${runs.length}; ${counted(ended.map(({ outcome }) => outcome))}`],
    ['200 to dead, undisturbed', spread(stops.filter(({ hit }) => !hit))],
    ['200 to dead, all', spread(stops)],
    ['repairs', counted(logs.flatMap(repairOf)) || 'none'],
    ['slowest request', `${Math.max(...client.requests.map(({ sentAt, answeredAt }) => answeredAt - sentAt))} ms`],
    ['duration', `${Math.round(seconds)} s`],
  ].map(([what, text]) => `${what.padEnd(26)}${text}`);
}

function outcomeOf({ status, body }) {
  if (status === undefined) return 'broken off';
  return status === 400 ? body.error.code : String(status);
}

function repairOf({ msg, repair }) {
  if (msg === 'reconciler repaired a job') return [repair];
  if (msg === 'requeued a run that this worker does not run') return ['orphan_requeued'];
  return msg === 'confirmed the stop of a run that this worker does not run' ? ['orphan_confirmed'] : [];
}

/** For each run that lived when its job's cancel was answered, the milliseconds until its process was dead. */
function stopsOf(cancels, watch, faults) {
  const first = new Map();
  for (const cancel of cancels) {
    if (cancel.status === 200 && !(first.get(cancel.jobId)?.answeredAt <= cancel.answeredAt))
      first.set(cancel.jobId, cancel);
  }
  return [...watch.runs.values()].flatMap(({ jobId, at, diedAt }) => {
    const cancel = first.get(jobId);
    if (!cancel || diedAt < cancel.sentAt || at > cancel.answeredAt) return [];
    const ms = Math.max(0, diedAt - cancel.answeredAt);
    return [{ ms, hit: faults.hit(cancel.sentAt, diedAt, SETTLE_MS) }];
  });
}

function spread(stops) {
  if (stops.length === 0) return 'none';
  const sorted = stops.map(({ ms }) => ms).sort((a, b) => a - b);
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return `p50 ${at(0.5)} ms, p99 ${at(0.99)} ms, max ${sorted.at(-1)} ms (${sorted.length} runs, looked at every ${LOOK_EVERY_MS} ms)`;
}

function counted(list) {
  const counts = new Map();
  for (const one of list) counts.set(one, (counts.get(one) ?? 0) + 1);
  return [...counts]
    .sort()
    .map(([name, count]) => `${count} ${name}`)
    .join(', ');
}
