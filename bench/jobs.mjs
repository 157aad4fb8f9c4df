// Single jobs of a real service: created, read and cancelled one at a time, with their processes.
import { readFileSync } from 'node:fs';
import { Agent, request } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';

export const JOBS = '/rest/v1/scenario-studio/jobs';
const agent = new Agent({ keepAlive: true });

/** Milliseconds between two times of `process.hrtime.bigint`. */
export const between = (from, to) => Number(to - from) / 1e6;

/** The process of a job's task, once its code runs; the worker's log tells both. */
export async function taskOf({ log }, jobId) {
  for (let tries = 0; tries < 3000; tries++) {
    const lines = readFileSync(log, 'utf8')
      .split('\n')
      .filter((line) => line.includes(jobId) && line.endsWith('}'))
      .map((line) => JSON.parse(line));
    if (lines.some(({ msg }) => msg === 'task output')) return lines.find(({ msg }) => msg === 'run began').taskPid;
    await sleep(10);
  }
  throw new Error(`the task of job ${jobId} did not start in time`);
}

/** Waits until the worker has confirmed the stop, and throws unless it was of this kind. */
export async function checkStopped({ pool }, jobId, how) {
  for (let tries = 0; tries < 500; tries++) {
    const { rows } = await pool.query('SELECT status, stopped_how FROM scenario_jobs WHERE id = $1', [jobId]);
    const [{ status, stopped_how }] = rows;
    if (status !== 'cancelled') throw new Error(`job ${jobId} is ${status}`);
    if (stopped_how === how) return;
    if (stopped_how) throw new Error(`job ${jobId} was stopped as ${stopped_how}, not ${how}`);
    await sleep(10);
  }
  throw new Error(`no worker confirmed the stop of job ${jobId} in time`);
}

/** One request to the site's api, or to another one. */
export function send({ api, key }, method, path, body) {
  const text = body && JSON.stringify(body);
  const headers = { authorization: `Bearer ${key}` };
  if (text) Object.assign(headers, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) });
  return new Promise((resolve, reject) => {
    request(`${api.url}${path}`, { agent, method, headers }, (response) => {
      let received = '';
      response.setEncoding('utf8').on('data', (chunk) => (received += chunk));
      response.on('end', () => resolve({ status: response.statusCode, body: JSON.parse(received) }));
    })
      .on('error', reject)
      .end(text);
  });
}
