import { setTimeout as sleep } from 'node:timers/promises';

export const SLOWEST_MS = 20_000;
/** How long a caller goes on trying. */
const PATIENCE_MS = 90_000;

/**
 * A caller of the apis that behaves as callers should: a request that was answered 503, or broken off, is sent again to
 * the other api. Remembers every request and its answer.
 */
export class Client {
  requests = [];

  constructor(world, random) {
    Object.assign(this, { world, random });
  }

  /** Sends until there is a real answer; returns undefined if there was none in time. */
  async insist(method, path, options) {
    let api = this.random.pick(this.world.apis);
    for (const deadline = Date.now() + PATIENCE_MS; Date.now() < deadline;) {
      const request = await this.send(method, path, options, api);
      if (request.status !== undefined && request.status !== 503) return request;
      await sleep(request.status === 503 ? 500 : 100);
      if (request.broken) api = this.world.apis.find((other) => other !== api);
    }
    return undefined;
  }

  /** Sends one request. `status` is undefined if it was broken off. */
  async send(method, path, { body, key, jobId } = {}, api = this.random.pick(this.world.apis)) {
    const request = { method, jobId, key, api: api.index, sentAt: Date.now() };
    this.requests.push(request);
    try {
      const response = await fetch(`${api.url}/rest/v1/scenario-studio/jobs${path}`, {
        method,
        signal: AbortSignal.timeout(2 * SLOWEST_MS),
        headers: {
          authorization: `Bearer ${this.world.key}`,
          ...(body && { 'content-type': 'application/json' }),
          ...(key && { 'idempotency-key': key }),
        },
        ...(body && { body: JSON.stringify(body) }),
      });
      const text = await response.text();
      Object.assign(request, { status: response.status, text });
      request.body = JSON.parse(text);
    } catch (error) {
      request.broken = error.cause?.code ?? error.cause?.message ?? error.message;
      delete request.status;
    }
    request.answeredAt = Date.now();
    return request;
  }
}
