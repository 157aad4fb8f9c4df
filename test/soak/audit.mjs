import { SLOWEST_MS } from './client.mjs';
import { leftOver } from './watch.mjs';

/** How long after it thaws a worker that was frozen between a claim and its fork may still fork. */
const THAWING_MS = 5000;
/** How long a process may live after the 200, whatever is done to its worker and however busy the machine is. */
const DEAD_WITHIN_MS = 30_000;
/** Types of errors that a caller may be told. */
const TYPES = new Set([
  ...['invalid_request', 'authentication_error', 'authorization_error', 'not_found', 'service_unavailable'],
]);

/** The rows of all jobs in Postgres. */
export function readRows(world) {
  return world.query(
    `SELECT j.id, j.status, j.run_id, j.attempt, j.started_at, j.completed_at, j.cancel_idempotency_key AS key, j.stopped_at,
            j.stopped_how, j.worker_id, (SELECT count(*)::int FROM scenarios s WHERE s.job_id = j.id) AS scenarios
     FROM scenario_jobs j`,
  );
}

/** Compares every job with what its callers were told. Returns the contradictions, as sentences. */
export function audit({ world, jobs, client, watch, faults, earlier, rows, logs }) {
  const faulty = [];
  const rowOf = new Map(rows.map((row) => [row.id, row]));
  const before = new Map(earlier.map((row) => [row.id, JSON.stringify(row)]));
  const begun = begunRuns(logs, watch);
  const cancelsOf = groupBy(client.requests.filter(isCancel), ({ jobId }) => jobId);
  const watched = groupBy([...watch.runs.values()], ({ jobId }) => jobId);
  const context = { faults, faulty, begun, watched, cancelsOf };
  for (const row of rows) {
    checkRow(row, context);
    if (before.get(row.id) !== JSON.stringify(row)) faulty.push(`${row.id} changed after it had ended`);
  }
  for (const { id, created } of jobs) {
    if (!created) faulty.push('a create got no answer in time');
    if (created?.status !== undefined && ![200, 201, 503].includes(created.status)) {
      faulty.push(`a create was answered ${created.status}: ${created.text}`);
    }
    if (!id) continue;
    const row = rowOf.get(id);
    if (!row) faulty.push(`${id} was answered ${created.status}, and does not exist`);
    else checkCancels(row, context);
  }
  const ids = jobs.flatMap(({ id }) => id ?? []);
  if (new Set(ids).size !== ids.length) faulty.push('two creates were answered with the same job');
  for (const request of client.requests) checkRequest(request, world, faulty);
  checkProcesses(begun, faulty);
  for (const why of world.unexpected) faulty.push(`a process ended by itself: ${why}`);
  for (const { msg, process, err } of logs) {
    if (msg === 'unexpected error') faulty.push(`${process} logged an unexpected error: ${err?.message}`);
  }
  return { faulty, begun };
}

const isCancel = ({ method }) => method === 'DELETE';

function groupBy(list, keyOf) {
  const groups = new Map();
  for (const one of list) groups.set(keyOf(one), [...(groups.get(keyOf(one)) ?? []), one]);
  return groups;
}

/** Every run that has begun, according to its worker's log, or else to the task's own report. */
function begunRuns(logs, watch) {
  const runs = new Map();
  for (const { runId, jobId, pid, at } of watch.runs.values()) runs.set(runId, { runId, jobId, pid, at });
  for (const line of logs.filter(({ msg }) => msg === 'run began')) {
    const { runId, jobId, taskPid: pid, at, process } = line;
    runs.set(runId, { runId, jobId, pid, at, process });
  }
  return groupBy([...runs.values()], ({ jobId }) => jobId);
}

function checkRow({ id, status, run_id: runId, stopped_at: stopped, scenarios }, { faulty }) {
  if (status === 'queued' || status === 'processing') faulty.push(`${id} is still ${status}`);
  if (scenarios !== (status === 'completed' ? 1 : 0)) faulty.push(`${id} is ${status} and has ${scenarios} scenarios`);
  if (status === 'cancelled' && runId && !stopped) faulty.push(`${id} was cancelled, and its run never confirmed gone`);
}

function checkCancels(row, { cancelsOf, faulty, begun, watched, faults }) {
  const cancels = cancelsOf.get(row.id) ?? [];
  const won = cancels.filter(({ status }) => status === 200);
  const open = cancels.some(({ status }) => status === undefined || status === 503);
  for (const cancel of cancels) {
    const { status, body } = cancel;
    if (status === 400 && body.error.code === 'job_not_cancellable') checkRefused(row, cancel, faulty);
    else if (status !== undefined && ![200, 503].includes(status))
      faulty.push(`cancel of ${row.id} was answered ${status}`);
  }
  if (won.length === 0) {
    if (row.status === 'cancelled' && !open) faulty.push(`${row.id} is cancelled, and nobody was told so`);
    return;
  }
  if (new Set(won.map(({ key }) => key)).size > 1 || (won.length > 1 && !won[0].key)) {
    faulty.push(`${row.id} was cancelled by ${won.length} requests`);
  }
  if ((won[0].key ?? null) !== row.key) faulty.push(`${row.id} was not cancelled by the request that was told so`);
  for (const { body } of won) checkTold(row, body, faulty);
  checkBegun(row, won[0], begun.get(row.id) ?? [], { faulty, faults });
  for (const { diedAt = Infinity } of watched.get(row.id) ?? []) {
    const ms = diedAt - won[0].answeredAt;
    if (ms > DEAD_WITHIN_MS) faulty.push(`${row.id}: its process lived for ${ms} ms after the 200`);
  }
}

/** Checks that what the answer said is still true. */
function checkTold(row, body, faulty) {
  if (row.status !== 'cancelled') faulty.push(`${row.id} was told to be cancelled, and is ${row.status}`);
  if (body.status !== 'cancelled' || body.scenario !== null) faulty.push(`${row.id}: a 200 said ${body.status}`);
  if (Date.parse(body.completed_at) !== row.completed_at?.getTime()) {
    faulty.push(
      `${row.id} was told to have ended at ${body.completed_at}, and did at ${row.completed_at?.toISOString()}`,
    );
  }
  const started = body.started_at === null ? undefined : Date.parse(body.started_at);
  if (started !== row.started_at?.getTime()) faulty.push(`${row.id} was told to have started at ${body.started_at}`);
}

/**
 * Checks that a refused cancel came after the job had ended. If the job was cancelled, `checkCancels` knows by whom.
 */
function checkRefused(row, { sentAt, answeredAt }, faulty) {
  if (!['completed', 'failed', 'cancelled'].includes(row.status) || row.completed_at.getTime() > answeredAt) {
    faulty.push(`a cancel of ${row.id}, sent at ${sentAt}, was refused before it had ended`);
  }
}

/** Checks what began after the caller had its 200: only the run that had already claimed the job may. */
function checkBegun(row, { body, answeredAt }, runs, { faulty, faults }) {
  if (body.started_at === null && runs.length > 0) faulty.push(`${row.id} was cancelled before it started, and ran`);
  for (const run of runs.filter(({ at }) => at > answeredAt)) {
    if (run.runId === row.run_id || faults.thawed(run.process, run.at, THAWING_MS)) continue;
    faulty.push(`${row.id}: a run began ${run.at - answeredAt} ms after the 200, and was not claimed before`);
  }
}

function checkRequest(request, world, faulty) {
  const { method, status, text, body, sentAt, answeredAt, broken, api } = request;
  const took = (answeredAt ?? Infinity) - sentAt;
  if (took > SLOWEST_MS) faulty.push(`a ${method} took ${took} ms`);
  if (broken) {
    const wasDown = world.apis[api].down.some(({ from, to }) => from <= answeredAt && sentAt <= to);
    if (!wasDown) faulty.push(`a ${method} to an api that was up was broken off: ${broken}`);
  } else if (status >= 400 && !isEnvelope(body)) faulty.push(`a ${method} was answered ${status}: ${text}`);
}

function isEnvelope(body) {
  const { type, code, message } = body?.error ?? {};
  return Object.keys(body ?? {}).join() === 'error' && TYPES.has(type) && Boolean(code) && Boolean(message);
}

function checkProcesses(begun, faulty) {
  const runs = new Map([...begun.values()].flat().map((run) => [run.runId, run]));
  for (const { pid, runId } of leftOver(runs)) faulty.push(`process ${pid} of ${runs.get(runId).jobId} still lives`);
}
