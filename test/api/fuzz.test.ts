import { connect } from 'node:net';
import fc from 'fast-check';
import { API_ERRORS } from '../../src/http/api-error';
import { TestSystem } from '../support/test-system';

const RUNS = 1200;
const AT_ONCE = 40;
/** Far more than the server takes to give up on a request that does not come. */
const DEADLINE_MS = 50_000;
/** What two equal batches may differ by, long after everything has been loaded. */
const STEADY_BYTES = 80 * 1024 * 1024;

type Answer = { status: number; headers: Map<string, string>; body: string };

let system: TestSystem;
let paths: { path: string; methods: string[] }[];
beforeAll(async () => {
  system = await TestSystem.start({ workers: 0, settings: { LOG_LEVEL: 'info' } });
  const description = (await (await fetch(`${system.api.url}/openapi.json`)).json()) as {
    servers: [{ url: string }];
    paths: Record<string, Record<string, unknown>>;
  };
  paths = Object.entries(description.paths).map(([path, operations]) => ({
    path: description.servers[0].url + path,
    methods: Object.keys(operations),
  }));
});
afterAll(() => system.stop());

/** Sends the bytes, in the pieces given, and reads whole answers until the connection is closed. */
function exchange(pieces: Buffer[], then: 'wait' | 'end' | 'cut') {
  const { hostname, port } = new URL(system.api.url!);
  return new Promise<Answer[]>((resolve, reject) => {
    let received: Buffer = Buffer.alloc(0);
    const answers: Answer[] = [];
    const socket = connect(Number(port), hostname, () => {
      void (async () => {
        for (const piece of pieces) {
          if (!socket.writable) return;
          socket.write(piece);
          if (pieces.length > 1) await new Promise((next) => setTimeout(next, 2));
        }
        if (then === 'cut') socket.destroy();
        if (then === 'end') socket.end();
      })();
    });
    const stuck = setTimeout(() => {
      socket.destroy();
      reject(
        new Error(
          `no end to ${JSON.stringify(Buffer.concat(pieces).toString('latin1').slice(0, 2000))}, after ${answers.length} answers`,
        ),
      );
    }, DEADLINE_MS);
    socket.on('data', (chunk) => {
      received = Buffer.concat([received, chunk]);
      for (let taken = takeAnswer(received); taken; taken = takeAnswer(received)) {
        received = taken.rest;
        if (taken.answer.status !== 100) answers.push(taken.answer);
      }
    });
    socket.on('error', () => undefined);
    socket.on('close', () => {
      clearTimeout(stuck);
      resolve(answers);
    });
  });
}

function takeAnswer(bytes: Buffer): { answer: Answer; rest: Buffer } | undefined {
  const end = bytes.indexOf('\r\n\r\n');
  if (end < 0) return undefined;
  const [first = '', ...lines] = bytes.subarray(0, end).toString('latin1').split('\r\n');
  const headers = new Map(
    lines.map((line) => line.split(/:\s*/, 2).map((part) => part.toLowerCase()) as [string, string]),
  );
  const status = Number(first.split(' ')[1]);
  // An answer to HEAD says a length and has no body: then the next answer follows at once.
  const isBare = status === 100 || bytes.subarray(end + 4, end + 13).toString('latin1') === 'HTTP/1.1 ';
  const length = isBare ? 0 : Number(headers.get('content-length') ?? 0);
  if (bytes.length < end + 4 + length) return undefined;
  const body = bytes.subarray(end + 4, end + 4 + length).toString();
  return { answer: { status, headers, body }, rest: bytes.subarray(end + 4 + length) };
}

const CODES = new Map(Object.entries(API_ERRORS).map(([code, { status, type }]) => [code, { status, type }]));

function faultOf({ status, headers, body }: Answer): string | undefined {
  if (!(status >= 200 && status < 500)) return `status ${status}`;
  if (!headers.get('x-request-id')) return 'no request id';
  if (status < 400 || (body === '' && headers.get('content-length') !== '0')) return undefined;
  if (!headers.get('content-type')?.startsWith('application/json')) return 'an error that is not JSON';
  const { error, ...rest } = JSON.parse(body) as { error: { type: string; code: string; message: string } };
  const known = CODES.get(error.code);
  if (known?.status !== status || known.type !== error.type) return `an error that nobody described: ${body}`;
  if (typeof error.message !== 'string' || Object.keys(error).length !== 3 || Object.keys(rest).length > 0)
    return `not the envelope: ${body}`;
  return undefined;
}

const text = fc.oneof(
  fc.string({ unit: 'binary', maxLength: 40 }),
  fc.string({ unit: 'grapheme', maxLength: 40 }),
  fc.constantFrom('', '\0', 'ü', '😀', '../../etc/passwd', '%', '%00', '%ff', '%2e%2e%2f', "' OR 1=1 --", '\ud800'),
);
const id = fc.oneof(
  fc.stringMatching(/^[a-z0-9]{12}$/),
  text.map((value) => encodeURIComponent(value.toWellFormed())),
  text.map((value) => value.replaceAll(/[\s\r\n]/g, '_')),
  fc.integer({ min: 1, max: 9000 }).map((length) => 'x'.repeat(length)),
);
const value: fc.Arbitrary<unknown> = fc.oneof(
  text,
  fc.constant('ada@example.com'),
  fc.jsonValue({ maxDepth: 3 }),
  fc.constantFrom(1e300, -0, 2 ** 60, null, true, [], {}, 'x'.repeat(10_001), 'x'.repeat(50_001)),
);
const FIELDS = ['user_email', 'prompt', 'context', 'scenario_slug', 'request_id', 'callback_url', '__proto__', 'other'];
const record = fc
  .array(fc.tuple(fc.constantFrom(...FIELDS), value), { maxLength: 6 })
  .map((entries) => `{${entries.map(([name, v]) => `${JSON.stringify(name)}:${JSON.stringify(v) ?? 'null'}`).join()}}`);
const body = fc.oneof(
  { weight: 6, arbitrary: record },
  { weight: 2, arbitrary: fc.constant(JSON.stringify({ user_email: 'ada@example.com', prompt: 'quick' })) },
  { weight: 2, arbitrary: fc.json({ maxDepth: 4 }) },
  { weight: 2, arbitrary: fc.uint8Array({ maxLength: 60 }).map((bytes) => Buffer.from(bytes).toString('latin1')) },
  {
    weight: 1,
    arbitrary: fc.constantFrom('', '{', '[]', '"', '[[[['.repeat(5000), '{"prompt":"'.padEnd(1_100_000, 'x')),
  },
);
const header = fc.oneof(
  fc.constantFrom(
    'Authorization: Bearer wrong',
    'Authorization: Basic YTpi',
    'authorization:',
    'Content-Type: text/plain',
    'Content-Type: application/json; charset=utf-16',
    'Content-Type: multipart/form-data',
    'Content-Encoding: gzip',
    'Expect: 100-continue',
    'Expect: nonsense',
    'Connection: Upgrade',
    'Upgrade: websocket',
    'Transfer-Encoding: chunked',
    'Transfer-Encoding: nonsense',
    'Content-Length: 3',
    'Content-Length: -1',
    'Content-Length: 99999999999',
    'Idempotency-Key: a',
    'Idempotency-Key: ',
    `Idempotency-Key: ${'k'.repeat(300)}`,
    `X-Filler: ${'x'.repeat(20_000)}`,
    'Accept: text/html',
    'Accept-Version: 9.0.0',
    'X-HTTP-Method-Override: DELETE',
    'Host: other',
    ' folded',
    'No colon',
    ': no name',
  ),
  fc
    .tuple(fc.constantFrom('Idempotency-Key', 'X-Request-Id', 'Authorization', 'Accept', 'X-Any'), text)
    .map(([name, v]) => `${name}: ${v.replaceAll(/[\r\n]/g, ' ')}`),
);
const request = fc.record({
  method: fc.constantFrom('GET', 'POST', 'DELETE', 'PUT', 'PATCH', 'HEAD', 'OPTIONS', 'delete', 'QUERY'),
  known: fc.nat(),
  sameMethod: fc.boolean(),
  id,
  tail: fc.oneof(
    { weight: 5, arbitrary: fc.constant('') },
    { weight: 1, arbitrary: text.map((t) => `?${encodeURI(t.toWellFormed())}`) },
    { weight: 1, arbitrary: fc.constantFrom('/', '//', '/x', ';a=b', '#f', '?') },
  ),
  authorized: fc.boolean(),
  headers: fc.array(header, { maxLength: 3 }),
  body,
  length: fc.constantFrom('right', 'right', 'right', 'none', 'short', 'chunked'),
});
type Request = typeof request extends fc.Arbitrary<infer T> ? T : never;

function bytesOf(sent: Request): Buffer {
  const { path, methods } = paths[sent.known % paths.length]!;
  const method = sent.sameMethod ? methods[0]!.toUpperCase() : sent.method;
  const target = path.replace(/\{\w+\}/, () => sent.id) + sent.tail;
  const content = Buffer.from(sent.body);
  const framing = {
    right: [`Content-Length: ${content.length}`],
    short: [`Content-Length: ${Math.floor(content.length / 2)}`],
    none: [],
    chunked: ['Transfer-Encoding: chunked'],
  }[sent.length];
  const head = [
    `${method} ${target} HTTP/1.1`,
    'Host: x',
    ...(sent.authorized ? [`Authorization: Bearer ${system.key}`] : []),
    'Content-Type: application/json',
    ...framing,
    ...sent.headers,
  ];
  const chunked = sent.length === 'chunked';
  return Buffer.concat([
    Buffer.from(`${head.join('\r\n')}\r\n\r\n`),
    ...(chunked
      ? [Buffer.from(`${content.length.toString(16)}\r\n`), content, Buffer.from('\r\n0\r\n\r\n')]
      : [content]),
  ]);
}

function inPieces(bytes: Buffer, count: number): Buffer[] {
  const size = Math.ceil(bytes.length / count);
  return Array.from({ length: count }, (_, index) => bytes.subarray(index * size, (index + 1) * size));
}

async function residentBytes(): Promise<number> {
  const metrics = await (await fetch(`${system.api.url}/metrics`)).text();
  return Number(/^process_resident_memory_bytes (\S+)/m.exec(metrics)?.[1]);
}

/** One batch: every request once, many at the same time. */
async function batch(seed: number): Promise<void> {
  const sample = fc.sample(
    fc.record({
      requests: fc.array(request, { minLength: 1, maxLength: 3 }),
      pieces: fc.constantFrom(1, 1, 1, 2, 7),
      then: fc.constantFrom('end' as const, 'end' as const, 'end' as const, 'cut' as const, 'wait' as const),
    }),
    { numRuns: RUNS, seed },
  );
  const lanes = Array.from({ length: AT_ONCE }, async (_, lane) => {
    for (let next = lane; next < sample.length; next += AT_ONCE) {
      const { requests, pieces, then } = sample[next]!;
      const last = Buffer.from('GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n');
      const bytes = Buffer.concat([...requests.map(bytesOf), last]);
      const answers = await exchange(inPieces(bytes, pieces), then);
      const fault = answers.map(faultOf).find(Boolean);
      if (fault) {
        throw new Error(
          `seed ${seed}, number ${next}: ${fault}\n${JSON.stringify(bytes.toString('latin1').replaceAll(/(.)\1{50,}/g, '$1…')).slice(0, 3000)}`,
        );
      }
    }
  });
  await Promise.all(lanes);
}

describe('whatever is sent', () => {
  it('is answered in the envelope or refused, never with a 5xx, never left hanging, and leaves nothing behind', async () => {
    const seed = Number(process.env.FUZZ_SEED ?? Date.now() % 2 ** 31);
    await batch(seed);
    const before = await residentBytes();
    await batch(seed);
    expect((await residentBytes()) - before).toBeLessThan(STEADY_BYTES);
    expect(system.api.logs.filter((line) => line.msg === 'unexpected error')).toEqual([]);
    expect(system.api.exit).toBeUndefined();
    const { id: jobId } = await system.create('quick');
    expect((await system.cancel(jobId)).status).toBe(200);
  }, 240_000);
});
