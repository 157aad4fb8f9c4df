import fc from 'fast-check';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { eventually } from '../support/eventually';
import { parseAnswers, RawConnection } from '../support/raw-http';
import { TestSystem } from '../support/test-system';
import { checkAnswers, converse, type Conversation, type Cut } from './fuzz/conversation';
import { type Kinds, KINDS, kindsOf } from './fuzz/kinds';
import { type OpenApi } from './fuzz/requests';

/** Cases of each kind in each round; set FUZZ_RUNS=1000 for a longer test. */
const RUNS = Number(process.env.FUZZ_RUNS ?? 40);
/** How many connections each case opens at the same time. */
const AT_ONCE = 6;
const MAX_GROWTH_BYTES = 10_000_000;
/** The server gives a request 15 s to arrive. */
const SLOWEST_MS = 40_000;

let system: TestSystem;
let kinds: Kinds;
let slow: Promise<{ what: string; received: Buffer; closed: boolean }[]>;

beforeAll(async () => {
  const NODE_OPTIONS = `--import=${pathToFileURL(join(__dirname, '../support/collect-on-signal.mjs')).href}`;
  system = await TestSystem.start({ workers: 0, api: () => ({ NODE_OPTIONS }) });
  const jobs = await Promise.all(Array.from({ length: 5 }, () => system.create('quick')));
  const document = (await (await fetch(`${system.api.url}/openapi.json`)).json()) as OpenApi;
  kinds = kindsOf({ key: system.key, jobIds: jobs.map(({ id }) => id), document });
  slow = Promise.all(SLOW.map(sendSlowly));
});
afterAll(() => system.stop());

async function hold(one: Conversation | Cut): Promise<void> {
  if ('cut' in one) return cutShort(one);
  checkAnswers(one, await converse(system.api.url!, one));
}

async function cutShort({ cut, afterMs }: Cut): Promise<void> {
  const connection = new RawConnection(system.api.url!);
  connection.send(cut);
  await sleep(afterMs);
  connection.cut();
}

/** Tries some cases of this kind. If one fails, fast-check prints the seed, which FUZZ_SEED accepts. */
async function fuzz(kind: (typeof KINDS)[number], runs: number): Promise<void> {
  const several = fc.array<Conversation | Cut>(kinds[kind], { minLength: 1, maxLength: AT_ONCE });
  const seed = process.env.FUZZ_SEED === undefined ? {} : { seed: Number(process.env.FUZZ_SEED) };
  await fc.assert(
    fc.asyncProperty(several, async (some) => {
      await Promise.all(some.map(hold));
    }),
    { numRuns: runs, ...seed },
  );
}

/** Bytes in use, once all garbage has been collected. */
async function memoryInUse(): Promise<number> {
  const metrics = () => system.api.metrics();
  const collections = (text: string) =>
    Number(/^nodejs_gc_duration_seconds_count.*"major".* (\S+)$/m.exec(text)?.[1] ?? 0);
  const before = collections(await metrics());
  process.kill(system.api.pid, 'SIGUSR2');
  const text = await eventually('all garbage is collected', async () => {
    const now = await metrics();
    return collections(now) > before && now;
  });
  const bytes = [...text.matchAll(/^nodejs_(?:heap_size_used|external_memory)_bytes (\S+)$/gm)];
  expect(bytes).toHaveLength(2);
  return bytes.reduce((sum, [, each]) => sum + Number(each), 0);
}

const HEAD = 'POST /rest/v1/scenario-studio/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n';
const SLOW = [
  { what: 'sends nothing', first: '', then: '' },
  { what: 'does not end its headers', first: HEAD, then: '' },
  { what: 'sends a header now and then', first: HEAD, then: 'X: y\r\n' },
  { what: 'does not send its body', first: `${HEAD}Content-Length: 100\r\n\r\n{`, then: '' },
  { what: 'sends its body byte by byte', first: `${HEAD}Content-Length: 100\r\n\r\n{`, then: ' ' },
  { what: 'sends small chunks', first: `${HEAD}Transfer-Encoding: chunked\r\n\r\n`, then: '1\r\n \r\n' },
];

async function sendSlowly({ what, first, then }: (typeof SLOW)[number]) {
  const connection = new RawConnection(system.api.url!);
  connection.send(Buffer.from(first));
  for (const began = Date.now(); !connection.closed && Date.now() - began < SLOWEST_MS; await sleep(1000)) {
    connection.send(Buffer.from(then));
  }
  const { received, closed } = connection;
  connection.cut();
  return { what, received, closed };
}

it.each(KINDS)('%s', (kind) => fuzz(kind, RUNS), 600_000);

it('memory does not grow', async () => {
  const round = async () => {
    for (const kind of KINDS) await fuzz(kind, Math.ceil(RUNS / 2));
    return memoryInUse();
  };
  const before = await round();
  const after = await round();
  expect(after - before).toBeLessThan(MAX_GROWTH_BYTES);
}, 600_000);

it.each(SLOW)('a caller that $what is refused in time', async ({ what, first }) => {
  const { received, closed } = (await slow).find((one) => one.what === what)!;
  expect(closed).toBe(true);
  const { answers } = parseAnswers(received, ['POST']);
  if (first === '') return;
  expect(answers.map(({ status, body }) => [status, JSON.parse(body) as unknown])).toEqual([
    [408, { error: expect.objectContaining({ code: 'request_timeout' }) }],
  ]);
});

it('the api still works after all this, and has met nothing that it did not expect', async () => {
  const job = await system.create('quick');
  expect(await system.get(job.id)).toMatchObject({ id: job.id, status: 'queued' });
  expect((await system.cancel(job.id)).status).toBe(200);
  expect(system.api.exit).toBeUndefined();
  expect((await system.apiLog()).filter(({ msg, level }) => msg === 'unexpected error' || level === 'fatal')).toEqual(
    [],
  );
});
