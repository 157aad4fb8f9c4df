import { randomBytes } from 'node:crypto';
import { hostname } from 'node:os';

/** Injection token of this process's worker id. */
export const WORKER_ID = Symbol('worker id');

/** An id that no other worker ever had, so that a restarted process owes nothing for its predecessor's runs. */
export function newWorkerId(): string {
  return `${hostname()}-${process.pid}-${randomBytes(4).toString('hex')}`;
}
