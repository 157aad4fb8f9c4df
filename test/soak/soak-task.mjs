// The task of the soak: the prompt says what it does and for how many milliseconds. Each run writes a line first, so
// that the audit knows every process that ever ran.
import { appendFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

const spin = (milliseconds) => {
  for (const end = Date.now() + milliseconds; Date.now() < end;);
};

const kinds = {
  quick: () => undefined,
  wait: (milliseconds, signal) => sleep(milliseconds, undefined, { signal }),
  spin,
  /** Goes on when it is asked to stop. */
  deaf: (milliseconds) => sleep(milliseconds),
  flaky: () => {
    if (Math.random() < 0.5) throw Object.assign(new Error('try again'), { retryable: true });
  },
  broken: () => {
    throw new Error('this never works');
  },
};

export default async function soakTask({ job_id: jobId, prompt }, { signal }) {
  const { SOAK_RUNS: file, SCENARIO_RUN_ID: runId } = process.env;
  appendFileSync(file, `${JSON.stringify({ jobId, runId, pid: process.pid, at: Date.now() })}\n`);
  const [kind, milliseconds] = prompt.split(' ');
  await kinds[kind](Number(milliseconds), signal);
  return { name: `Scenario of ${jobId}` };
}
