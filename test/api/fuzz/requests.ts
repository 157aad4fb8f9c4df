// Requests of every kind, made from the service's own OpenAPI document: valid ones, slightly wrong ones, garbage.
import fc from 'fast-check';
import { gzipSync } from 'node:zlib';

type Schema = {
  type?: string;
  format?: string;
  maxLength?: number;
  properties?: Record<string, Schema>;
  $ref?: string;
};
type Operation = { requestBody?: { content: Record<string, { schema: Schema }> } };
export type OpenApi = {
  servers: { url: string }[];
  paths: Record<string, Record<string, Operation>>;
  components: { schemas: Record<string, Schema> };
};

/**
 * A request before it is turned into bytes. `id` is the request id that its answer must have, if it is answered as a
 * request.
 */
export type Request = {
  method: string;
  target: string;
  version: string;
  headers: [string, string][];
  body: Buffer;
  id: string;
};

/** Everything but the body is latin1, so that any byte can stand anywhere. */
export function toBytes({ method, target, version, headers, body }: Request): Buffer {
  const lines = [`${method} ${target} ${version}`, ...headers.map(([name, value]) => `${name}: ${value}`)];
  return Buffer.concat([Buffer.from(`${lines.join('\r\n')}\r\n\r\n`, 'latin1'), body]);
}

/** What requests are made from: a valid key, jobs that exist, and the service's description of itself. */
export type World = { key: string; jobIds: string[]; document: OpenApi };

const METHODS = ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'TRACE', 'PROPFIND', 'QUERY', 'SEARCH'];
const OTHER_PATHS = ['/', '/livez', '/readyz', '/metrics', '/openapi.json', '/docs', '/docs/', '/rest/v1', '*', '//'];
const utf8 = (text: string) => Buffer.from(text).toString('latin1');

/** Text that can stand in a header: no control character, nothing beyond latin1. */
const headerText = fc
  .array(fc.oneof(fc.integer({ min: 0x20, max: 0x7e }), fc.integer({ min: 0x80, max: 0xff })), { maxLength: 40 })
  .map((bytes) => String.fromCharCode(...bytes));

const strangeIds = [
  ...[
    '',
    '.',
    '..',
    '%2e%2e',
    '..%2f..%2fetc%2fpasswd',
    '../../etc/passwd',
    '....//',
    '%00',
    'a%00b',
    '%',
    '%zz',
    '%e0%a4%a',
  ],
  ...['%ff', '%c0%af', '%ed%a0%80', '%252e', 'J1O2B3I4D5X6', 'j1o2b3i4d5x', 'j1o2b3i4d5x66', 'j1o2b3i4d5x6%20', '1'],
  ...[
    'null',
    'undefined',
    '__proto__',
    'constructor',
    '{job_id}',
    ':job_id',
    '*',
    "'%20OR%201=1--",
    ';',
    '#',
    '?',
    '//',
  ],
  ...[
    'x'.repeat(300),
    'x'.repeat(9000),
    '%41'.repeat(2000),
    '%00'.repeat(2000),
    utf8('çava日本😀'),
    utf8('\u202e'),
    '\x80\xff',
  ],
];

/** A body, as bytes, with the headers that go with it. */
type Body = { bytes: Buffer; headers?: [string, string][] };

export function requestsOf({ key, jobIds, document }: World) {
  const prefix = document.servers[0]?.url ?? '';
  const operations = Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({
      method: method.toUpperCase(),
      path: `${prefix}${path}`,
      schema: schemaOf(operation, document),
    })),
  );
  const fields = operations.find(({ schema }) => schema)?.schema?.properties ?? {};

  const id = fc.oneof(
    fc.constantFrom(...jobIds),
    fc.stringMatching(/^[a-z][a-z0-9]{11}$/),
    fc.constantFrom(...strangeIds),
    fc.string({ unit: 'binary', maxLength: 40 }).map(encodeURIComponent),
    fc.string({ unit: fc.constantFrom('%', '0', 'a', 'f', '/', '.', '?', '&', '=', ';', '\\', '+'), maxLength: 30 }),
  );
  const query = fc.oneof(
    { weight: 4, arbitrary: fc.constant('') },
    fc.constantFrom(
      '?',
      '??',
      '?a=%',
      '?__proto__[x]=1',
      '?a[]=1&a[b]=2',
      `?${'a=1&'.repeat(2000)}`,
      '?=',
      '?%00',
      '#x',
    ),
    fc.webQueryParameters().map((text) => `?${utf8(text)}`),
  );
  const path = fc.oneof(
    { weight: 6, arbitrary: fc.constantFrom(...operations.map((operation) => operation.path)) },
    fc.constantFrom(...OTHER_PATHS),
    fc.webPath().map(utf8),
    fc.constantFrom(...operations.map(({ path }) => `http://elsewhere.example${path}`)),
  );
  const target = fc
    .tuple(path, id, query)
    .map(([path, id, query]) => path.replace('{job_id}', () => id) + query)
    // A space would end the target.
    .map((text) => text.replaceAll(' ', '%20') || '/');
  const plainTarget = fc
    .tuple(fc.constantFrom(...operations), fc.constantFrom(...jobIds, 'j1o2b3i4d5x6'))
    .map(([{ method, path }, id]) => ({ method, target: path.replace('{job_id}', id) }));

  const requestId = fc.uuid().map((uuid) => `fuzz-${uuid}`);
  const rightBody = validBody(fields);

  /** A valid request for one of the operations, whose answer can be recognised as its own. */
  const right: fc.Arbitrary<Request> = fc
    .tuple(plainTarget, requestId, rightBody)
    .map(([{ method, target }, id, body]) => ({
      method,
      target,
      version: 'HTTP/1.1',
      headers: [
        ['Host', 'x'],
        ['Authorization', `Bearer ${key}`],
        ['X-Request-Id', id],
        ...(method === 'POST' ? ([['Content-Type', 'application/json']] as [string, string][]) : []),
        ...(method === 'POST' ? ([['Content-Length', String(body.length)]] as [string, string][]) : []),
      ],
      body: method === 'POST' ? body : Buffer.alloc(0),
      id,
    }));

  const withTarget = fc
    .tuple(right, fc.constantFrom(...METHODS, ...operations.map(({ method }) => method)), target)
    .map(([request, method, target]) => ({ ...request, method, target }));

  const withHeaders = fc
    .tuple(right, fc.array(strangeHeader(key), { minLength: 1, maxLength: 4 }), fc.boolean())
    .map(([request, strange, replace]) => {
      const names = new Set(strange.map(([name]) => name.toLowerCase()));
      const kept = request.headers.filter(([name]) => !replace || !names.has(name.toLowerCase()));
      return { ...request, headers: [...kept, ...strange] };
    });

  const withBody = fc
    .tuple(
      right,
      strangeBody(fields, rightBody),
      fc.constantFrom('POST', 'POST', 'POST', 'POST', 'DELETE', 'GET', 'PUT'),
    )
    .map(([request, body, method]): Request => ({
      ...request,
      method,
      target: method === 'POST' ? (operations.find((one) => one.schema)?.path ?? '/') : request.target,
      headers: [
        ...request.headers.filter(([name]) => !/^content-/i.test(name)),
        ['Content-Type', 'application/json'],
        ['Content-Length', String(body.bytes.length)],
        ...(body.headers ?? []),
      ],
      body: body.bytes,
    }));

  const withFraming = fc.tuple(right, strangeFraming).map(([request, { headers, body, version }]): Request => ({
    ...request,
    method: 'POST',
    target: operations.find((one) => one.schema)?.path ?? '/',
    version: version ?? request.version,
    headers: [
      ...request.headers.filter(([name]) => !/^content-/i.test(name) && !(headers.length === 0 && name === 'Host')),
      ['Content-Type', 'application/json'],
      ...headers,
    ],
    body: Buffer.from(body, 'latin1'),
  }));

  return { right, withTarget, withHeaders, withBody, withFraming };
}

function schemaOf({ requestBody }: Operation, { components }: OpenApi): Schema | undefined {
  const name = requestBody?.content['application/json']?.schema.$ref?.split('/').at(-1);
  return name === undefined ? undefined : components.schemas[name];
}

const text = fc.oneof(fc.string({ unit: 'binary', maxLength: 60 }), fc.lorem({ maxCount: 5 }));

/** A body such as the document asks for, or nearly: its texts are of any kind, and sometimes at their limits. */
function validBody(fields: Record<string, Schema>): fc.Arbitrary<Buffer> {
  const values = Object.fromEntries(
    Object.entries(fields)
      .filter(([, { type }]) => type === 'string')
      .map(([name, { format, maxLength = 100 }]) => [
        name,
        format === 'email'
          ? fc.constantFrom('ada@example.com', 'a.b+c@sub.example.org')
          : fc.oneof(
              { weight: 8, arbitrary: text },
              fc.constantFrom('x'.repeat(maxLength), '😀'.repeat(maxLength / 2)),
            ),
      ]),
  );
  return fc
    .record(values, { requiredKeys: ['user_email', 'prompt'] })
    .map((body) => Buffer.from(JSON.stringify({ ...body, scenario_slug: undefined })));
}

/** Values that are of a wrong type, too large, or expressible in JSON but in little else; as JSON text. */
const strangeValue = fc.oneof(
  fc.constantFrom(
    'null',
    'true',
    '-0',
    '1e999',
    '-1e999',
    '9'.repeat(5000),
    '[]',
    '{}',
    '""',
    '"\\u0000"',
    '"\\ud800"',
  ),
  fc.constantFrom('"\\udc00\\ud800"', '{"__proto__":{"a":1}}', '{"toString":1}', '{"length":3}', '["a@example.com"]'),
  fc.constantFrom('{"constructor":{"prototype":{"a":1}}}', '{"then":1}', `"${'x'.repeat(60_000)}"`, '"\\u202e"'),
  fc.integer({ min: 1, max: 5 }).map((power) => '['.repeat(10 ** power) + ']'.repeat(10 ** power)),
  fc.integer({ min: 1, max: 4 }).map((power) => '{"a":'.repeat(10 ** power) + '1' + '}'.repeat(10 ** power)),
  fc.jsonValue({ maxDepth: 4 }).map((value) => JSON.stringify(value)),
);

const strangeName = fc.constantFrom(
  '__proto__',
  'constructor',
  'prototype',
  'toString',
  '',
  'a'.repeat(5000),
  '\0',
  'then',
);

function strangeBody(fields: Record<string, Schema>, rightBody: fc.Arbitrary<Buffer>): fc.Arbitrary<Body> {
  const names = Object.keys(fields);
  const withValue = fc.tuple(rightBody, fc.constantFrom(...names), strangeValue).map(([body, name, value]) => {
    const others = Object.entries(JSON.parse(body.toString()) as object).filter(([other]) => other !== name);
    const members = [...others.map(([other, kept]) => `${JSON.stringify(other)}:${JSON.stringify(kept)}`)];
    return `{${[...members, `${JSON.stringify(name)}:${value}`].join(',')}}`;
  });
  const withField = fc
    .tuple(rightBody, strangeName, strangeValue)
    .map(([body, name, value]) => `${body.toString().slice(0, -1)},${JSON.stringify(name)}:${value}}`);
  const whole = fc.oneof(
    strangeValue,
    fc.constantFrom(
      '',
      ' ',
      '{',
      '}',
      '{}{}',
      '{"a":}',
      "{'a':1}",
      'NaN',
      'undefined',
      '\ufeff{}',
      '{"prompt":"a","prompt":1}',
    ),
    fc.constantFrom('['.repeat(500_000), '{"a":'.repeat(100_000), '"'.repeat(1000), '\\u0000'),
  );
  const broken = fc
    .tuple(rightBody, fc.nat(200), fc.uint8Array({ maxLength: 4 }))
    .map(([body, at, bytes]) => Buffer.concat([body.subarray(0, at), bytes, body.subarray(at + bytes.length)]));
  const cut = fc.tuple(rightBody, fc.nat(200)).map(([body, at]) => body.subarray(0, at));
  const notUtf8 = fc
    .constantFrom('\xff\xfe', '\xc0\x80', '\xed\xa0\x80', '\xf8\x88\x80\x80\x80')
    .map((bytes) => Buffer.from(`{"user_email":"ada@example.com","prompt":"${bytes}"}`, 'latin1'));
  const large = fc
    .constantFrom(1024 * 1024 - 100, 1024 * 1024, 1024 * 1024 + 1, 2 * 1024 * 1024)
    .map((size) => Buffer.from(`{"user_email":"ada@example.com","prompt":"${'x'.repeat(size - 44)}"}`));
  const compressed = fc
    .tuple(rightBody, fc.constantFrom('gzip', 'br', 'deflate', 'identity', 'nonsense'))
    .map(([body, encoding]): Body => ({
      bytes: encoding === 'gzip' ? gzipSync(body) : body,
      headers: [['Content-Encoding', encoding]],
    }));
  const bytes = fc.oneof(
    { weight: 4, arbitrary: withValue.map((json) => Buffer.from(json)) },
    { weight: 2, arbitrary: withField.map((json) => Buffer.from(json)) },
    { weight: 3, arbitrary: whole.map((json) => Buffer.from(json)) },
    { weight: 2, arbitrary: broken },
    cut,
    notUtf8,
    large,
  );
  return fc.oneof({ weight: 8, arbitrary: bytes.map((bytes) => ({ bytes })) }, compressed);
}

function strangeHeader(key: string): fc.Arbitrary<[string, string]> {
  const named = (name: string, ...values: string[]) =>
    fc.oneof(fc.constantFrom(...values), headerText).map((value): [string, string] => [name, value]);
  return fc.oneof(
    named('Authorization', '', 'Bearer', `bearer  ${key}`, `Basic ${key}`, `Bearer ${key}x`, `Bearer ${key},${key}`),
    named('Authorization', `Bearer ${'x'.repeat(10_000)}`, `Bearer exec_live_${'x'.repeat(40)}`, 'Bearer \xff'),
    named(
      'Content-Type',
      '',
      'text/plain',
      'application/json; charset=utf-16',
      'APPLICATION/JSON',
      'application/jsonx',
    ),
    named(
      'Content-Type',
      'application/json, text/html',
      'multipart/form-data',
      'a/b; c',
      '/',
      'application/json;;;',
      '__proto__',
    ),
    named('Idempotency-Key', '', 'k', 'x'.repeat(255), 'x'.repeat(256), '\xe9', ' spaced '),
    named('X-Request-Id', '', 'ok-1', 'with space', 'x'.repeat(129), '{"a":1}', '\x80'),
    named('Expect', '100-continue', '200-ok', '', '100-Continue, x'),
    named('Connection', 'upgrade', 'close', 'keep-alive, Upgrade', 'x', 'close, close'),
    named('Upgrade', 'websocket', 'h2c', 'TLS/1.0'),
    named('Host', '', 'a b', '[::1', 'x:99999', '\xff'),
    named('Accept', '*/*;q=9', 'text/html', '\xff'),
    named('Accept-Encoding', 'gzip', 'br;q=x', '*'),
    named('Cookie', 'a=b; '.repeat(1000)),
    named('Range', 'bytes=0-0', 'bytes=9-1', 'x'),
    named('If-None-Match', '*', '"x"'),
    named('If-Modified-Since', 'yesterday', 'Thu, 01 Jan 2099 00:00:00 GMT'),
    named('X-Forwarded-For', '127.0.0.1', 'x'),
    named('X-HTTP-Method-Override', 'DELETE'),
    named('Accept-Version', '1.x', '*', 'x'),
    named('Content-Encoding', 'gzip', 'br'),
    named('__proto__', 'x'),
    fc.tuple(fc.stringMatching(/^[A-Za-z!#$%&'*+.^_`|~-]{1,30}$/), headerText),
  );
}

type Framing = { headers: [string, string][]; body: string; version?: string };
const JSON_BODY = '{"user_email":"ada@example.com","prompt":"framed"}';
const LENGTH = String(JSON_BODY.length);
const CHUNKED = `${JSON_BODY.length.toString(16)}\r\n${JSON_BODY}\r\n0\r\n\r\n`;

/** Lengths, transfer encodings and versions that contradict each other or the body. */
const strangeFraming: fc.Arbitrary<Framing> = fc.oneof(
  fc
    .constantFrom(
      '0',
      '1',
      '49',
      '51',
      '500',
      '-1',
      '+50',
      '5e1',
      '0x32',
      '50,50',
      '50, 51',
      '9'.repeat(30),
      'x',
      '',
      '50 ',
    )
    .map((length): Framing => ({ headers: [['Content-Length', length]], body: JSON_BODY })),
  fc.constantFrom(LENGTH, '5', '0').map((second): Framing => ({
    headers: [
      ['Content-Length', LENGTH],
      ['Content-Length', second],
    ],
    body: JSON_BODY,
  })),
  fc
    .constantFrom(
      'chunked',
      'Chunked',
      'gzip, chunked',
      'chunked, gzip',
      'chunked, chunked',
      'xchunked',
      'identity',
      '',
      '\x0bchunked',
    )
    .chain((encoding) =>
      fc.boolean().map((both): Framing => ({
        headers: [['Transfer-Encoding', encoding], ...(both ? [['Content-Length', LENGTH] as [string, string]] : [])],
        body: CHUNKED,
      })),
    ),
  fc
    .constantFrom(
      ...[
        'zz\r\n',
        '-1\r\n',
        `${'f'.repeat(20)}\r\n`,
        '5\r\nhello',
        '5\r\nhelloworld\r\n',
        '0\r\n',
        '0\r\nTrailer: x\r\n\r\n',
      ],
      ...[
        `5;${'x'.repeat(20_000)}\r\nhello\r\n`,
        '1\r\n{\r\n1\r\n}\r\n0\r\n\r\n',
        '5\nhello\n0\n\n',
        '\r\n',
        `0\r\n${'a: b\r\n'.repeat(5000)}\r\n`,
      ],
    )
    .map((body): Framing => ({ headers: [['Transfer-Encoding', 'chunked']], body })),
  fc
    .constantFrom('HTTP/1.0', 'HTTP/0.9', 'HTTP/2.0', 'HTTP/9.9', 'http/1.1', 'HTTP/1.1x', '', 'RTSP/1.0', 'ICE/1.0')
    .map((version): Framing => ({ headers: [['Content-Length', LENGTH]], body: JSON_BODY, version })),
  // Without any headers of its own, the request has no Host either.
  fc.constant<Framing>({ headers: [], body: '' }),
  fc
    .constantFrom<[string, string]>(
      ['Content-Length ', LENGTH],
      [' Content-Length', LENGTH],
      ['X', 'a\nb'],
      ['X', 'a\r\n b'],
    )
    .map((header): Framing => ({ headers: [header, ['Content-Length', LENGTH]], body: JSON_BODY })),
  fc
    .constantFrom<[string, string]>(
      ['X', 'a\0b'],
      ['', 'x'],
      ['X\xff', 'x'],
      ['X Y', 'z'],
      ['Host', 'second'],
      ['X', 'a\rb'],
    )
    .map((header): Framing => ({ headers: [header, ['Content-Length', LENGTH]], body: JSON_BODY })),
);
