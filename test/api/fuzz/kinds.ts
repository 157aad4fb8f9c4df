import fc from 'fast-check';
import { type Conversation, type Cut } from './conversation';
import { type Request, requestsOf, toBytes, type World } from './requests';

const MIB = 1024 * 1024;

export const KINDS = [
  'methods, ids and query strings',
  'headers',
  'bodies',
  'lengths and encodings',
  'flipped, lost and added bytes',
  'bytes that trickle',
  'requests in a row',
  'requests in a row, and then a wrong one',
  'connections that are cut',
] as const;

export type Kinds = Record<(typeof KINDS)[number], fc.Arbitrary<Conversation | Cut>>;

/** Everything that is sent to the service, by its kind. */
export function kindsOf(world: World): Kinds {
  const { right, withTarget, withHeaders, withBody, withFraming } = requestsOf(world);
  const any = fc.oneof(right, withTarget, withHeaders, withBody, withFraming);
  const rightOnes = (minLength: number, maxLength: number) => fc.array(right, { minLength, maxLength });
  return {
    'methods, ids and query strings': withTarget.map(alone),
    headers: withHeaders.map(alone),
    bodies: withBody.map(alone),
    'lengths and encodings': withFraming.map((request) => conversation([closing(request)])),
    'flipped, lost and added bytes': fc
      .tuple(right, fc.nat(300), fc.nat(3), fc.uint8Array({ maxLength: 3 }))
      .map(([request, at, lost, added]) => {
        const bytes = toBytes(closing(request));
        const changed = Buffer.concat([bytes.subarray(0, at), added, bytes.subarray(at + lost)]);
        return conversation([request], { pieces: [changed] });
      }),
    'bytes that trickle': fc.tuple(any, fc.array(fc.nat(400), { maxLength: 6 })).map(([request, places]) => {
      const pieces = inPieces(toBytes(closing(request)), places);
      return conversation([request], { pieces, pauseMs: 3 });
    }),
    'requests in a row': rightOnes(2, 8).map((requests) => {
      const row = numbered([...requests.slice(0, -1), ...requests.slice(-1).map(closing)]);
      return conversation(row, { complete: true, owned: row.length });
    }),
    'requests in a row, and then a wrong one': fc
      .tuple(rightOnes(1, 5), any, rightOnes(0, 2))
      .map(([before, wrong, after]) => conversation(numbered([...before, wrong, ...after]), { owned: before.length })),
    'connections that are cut': fc
      .tuple(any, fc.nat(400), fc.nat(10))
      .map(([request, at, afterMs]) => ({ cut: toBytes(request).subarray(0, at), afterMs })),
  };
}

/** A request that must be answered, and is the last on its connection. */
function alone(request: Request): Conversation {
  // The answer that a body is too large can be lost if the connection is closed while the body is still being sent.
  return conversation([closing(request)], { complete: request.body.length <= MIB });
}

function conversation(requests: Request[], more: Partial<Conversation> = {}): Conversation {
  const talk = { pieces: [Buffer.concat(requests.map(toBytes))], requests, complete: false, owned: 0, ...more };
  const words = () => JSON.stringify(Buffer.concat(talk.pieces).toString('latin1')).slice(0, 3000);
  return Object.assign(talk, { [fc.toStringMethod]: words });
}

function closing(request: Request): Request {
  if (request.headers.some(([name]) => /^connection$/i.test(name))) return request;
  return { ...request, headers: [...request.headers, ['Connection', 'close']] };
}

/** Makes request ids unique within a connection, however fast-check shrinks the requests. */
function numbered(requests: Request[]): Request[] {
  return requests.map((request, index) => {
    const id = `${request.id}-${index}`;
    const headers = request.headers.map(([name, value]): [string, string] => [name, value === request.id ? id : value]);
    return { ...request, id, headers };
  });
}

function inPieces(bytes: Buffer, places: number[]): Buffer[] {
  const ends = [...places.sort((a, b) => a - b), bytes.length];
  return ends.map((end, index) => bytes.subarray(ends[index - 1] ?? 0, end));
}
