import { connect, type Socket } from 'node:net';

/** Sends bytes as they are, and returns everything that comes back until the other side closes. */
export async function rawHttp(baseUrl: string, bytes: string | Buffer): Promise<string> {
  const { hostname, port } = new URL(baseUrl);
  return new Promise((resolve, reject) => {
    const socket = connect(Number(port), hostname, () => socket.write(bytes));
    let answer = '';
    socket.setEncoding('utf8').on('data', (chunk: string) => (answer += chunk));
    socket.on('close', () => resolve(answer));
    socket.on('error', (error: NodeJS.ErrnoException) =>
      error.code === 'ECONNRESET' ? resolve(answer) : reject(error),
    );
  });
}

/** The status and the body of a raw answer. */
export function parseAnswer(answer: string): { status: number; headers: string; body: unknown } {
  const [head = '', ...rest] = answer.split('\r\n\r\n');
  return { status: Number(head.split(' ')[1]), headers: head.toLowerCase(), body: JSON.parse(rest.join('\r\n\r\n')) };
}

/** A connection that sends bytes as they are and collects what comes back. */
export class RawConnection {
  received = Buffer.alloc(0);
  closed = false;
  private readonly socket: Socket;

  constructor(baseUrl: string) {
    const { hostname, port } = new URL(baseUrl);
    this.socket = connect({ port: Number(port), host: hostname, noDelay: true, allowHalfOpen: true });
    this.socket.on('data', (chunk: Buffer) => {
      this.received = Buffer.concat([this.received, chunk]);
    });
    // A connection that was reset, or written to after the other side had closed, is closed all the same.
    this.socket.on('error', () => undefined);
    this.socket.on('end', () => this.socket.end());
    this.socket.on('close', () => (this.closed = true));
  }

  send(bytes: Buffer): void {
    this.socket.write(bytes);
  }

  stopReading(): void {
    this.socket.pause();
  }

  /** Says that nothing more will be sent. */
  finish(): void {
    this.socket.end();
  }

  cut(): void {
    this.socket.destroy();
  }
}

export type RawAnswer = { status: number; headers: Record<string, string[]>; body: string };

/**
 * The answers in what came back, in order, without interim ones (100 Continue). `methods` are those of the requests:
 * the answer to HEAD has no body. `rest` is what is not yet a whole answer.
 */
export function parseAnswers(bytes: Buffer, methods: string[]): { answers: RawAnswer[]; rest: Buffer } {
  const answers: RawAnswer[] = [];
  for (let rest = bytes; ;) {
    const parsed = parseOne(rest, methods[answers.length] === 'HEAD');
    if (!parsed) return { answers, rest };
    if (parsed.answer.status >= 200) answers.push(parsed.answer);
    rest = parsed.rest;
  }
}

function parseOne(bytes: Buffer, bodiless: boolean): { answer: RawAnswer; rest: Buffer } | undefined {
  const end = bytes.indexOf('\r\n\r\n');
  if (end < 0) return undefined;
  const [first = '', ...lines] = bytes.subarray(0, end).toString('latin1').split('\r\n');
  const [, status] = /^HTTP\/1\.1 (\d{3}) /.exec(first) ?? [];
  if (!status) throw new Error(`This is no status line: ${JSON.stringify(first)}`);
  const headers: Record<string, string[]> = {};
  for (const line of lines) {
    const colon = line.indexOf(':');
    (headers[line.slice(0, colon).toLowerCase()] ??= []).push(line.slice(colon + 1).trim());
  }
  const body = bodyOf(bytes.subarray(end + 4), headers, bodiless || Number(status) < 200 || status === '304');
  if (!body) return undefined;
  return { answer: { status: Number(status), headers, body: body.bytes.toString() }, rest: body.rest };
}

function bodyOf(bytes: Buffer, headers: RawAnswer['headers'], bodiless: boolean) {
  if (bodiless) return { bytes: Buffer.alloc(0), rest: bytes };
  if (headers['transfer-encoding']) return chunksOf(bytes);
  const length = Number(headers['content-length']?.[0] ?? 0);
  return bytes.length < length ? undefined : { bytes: bytes.subarray(0, length), rest: bytes.subarray(length) };
}

function chunksOf(bytes: Buffer) {
  const chunks: Buffer[] = [];
  for (let at = 0; ;) {
    const line = bytes.indexOf('\r\n', at);
    const size = Number.parseInt(bytes.subarray(at, line).toString('latin1'), 16);
    if (line < 0 || bytes.length < line + 2 + size + 2) return undefined;
    chunks.push(bytes.subarray(line + 2, line + 2 + size));
    at = line + 2 + size + 2;
    if (size === 0) return { bytes: Buffer.concat(chunks), rest: bytes.subarray(at) };
  }
}
