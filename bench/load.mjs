// The load generator, a process of its own. Plain HTTP/1.1 over keep-alive sockets, one request at a time on each, so
// that it takes as little as possible of the machine it shares with what it measures.
import { connect } from 'node:net';
import { serve } from './helper.mjs';
import { summarise } from './statistics.mjs';

class Connection {
  #received = '';
  #answered;

  static async open(port) {
    const connection = new Connection();
    const socket = connect({ port, host: '127.0.0.1', noDelay: true });
    await new Promise((resolve, reject) => socket.once('connect', resolve).once('error', reject));
    connection.socket = socket;
    // One character for each byte, so that lengths match Content-Length.
    socket.setEncoding('latin1');
    socket.on('data', (text) => connection.#receive(text));
    socket.on('close', () => connection.#answered?.({ status: 0, body: 'the connection was closed' }));
    socket.on('error', () => undefined);
    return connection;
  }

  request(text) {
    return new Promise((resolve) => {
      this.#answered = resolve;
      this.socket.write(text);
    });
  }

  #receive(text) {
    this.#received += text;
    const end = this.#received.indexOf('\r\n\r\n');
    if (end < 0) return;
    const length = Number(/\r\ncontent-length: *(\d+)/i.exec(this.#received.slice(0, end))?.[1]);
    if (this.#received.length < end + 4 + length) return;
    const answer = { status: Number(this.#received.slice(9, 12)), body: this.#received.slice(end + 4) };
    this.#received = '';
    this.#answered(answer);
  }
}

const kept = new Map();

/** Returns `count` connections, which are kept for later, as a service's HTTP client keeps its own. */
async function connectionsTo(port, count) {
  const open = (kept.get(port) ?? []).filter(({ socket }) => !socket.destroyed);
  const more = Array.from({ length: count - open.length }, () => Connection.open(port));
  kept.set(port, [...open, ...(await Promise.all(more))]);
  return kept.get(port).slice(0, count);
}

function textOf({ method, key, body, port }, path) {
  const headers = [`${method} ${path} HTTP/1.1`, `Host: 127.0.0.1:${port}`, `Authorization: Bearer ${key}`];
  if (body) headers.push('Content-Type: application/json', `Content-Length: ${Buffer.byteLength(body)}`);
  return `${headers.join('\r\n')}\r\n\r\n${body ?? ''}`;
}

/**
 * Sends one request for each path, and measures all but the first `lead`. Throws unless every answer is as expected.
 */
async function load({ port, concurrency, paths, lead = 0, expect, ...request }) {
  const texts = paths.map((path) => textOf({ ...request, port }, path));
  const connections = await connectionsTo(port, concurrency);
  const wrong = [];
  const sendAll = async (some) => {
    const milliseconds = new Float64Array(some.length);
    let next = 0;
    const work = async (connection) => {
      while (next < some.length) {
        const index = next++;
        const sent = performance.now();
        const { status, body } = await connection.request(some[index]);
        milliseconds[index] = performance.now() - sent;
        if (status !== expect.status || !body.includes(expect.body)) wrong.push(`${status} ${body}`);
      }
    };
    await Promise.all(connections.map(work));
    return milliseconds;
  };
  await sendAll(texts.slice(0, lead));
  const cpu = process.cpuUsage();
  const began = performance.now();
  const milliseconds = await sendAll(texts.slice(lead));
  const elapsed = performance.now() - began;
  const { user, system } = process.cpuUsage(cpu);
  if (wrong.length > 0) throw new Error(`${wrong.length} of ${texts.length} answers were wrong, such as: ${wrong[0]}`);
  return { ...summarise(milliseconds, elapsed), generatorCpu: (user + system) / 1000 / elapsed };
}

/** Sends one request and says when it was sent and answered, in times of `process.hrtime`. */
async function sendOne({ path, ...request }) {
  const [connection] = await connectionsTo(request.port, 1);
  const text = textOf(request, path);
  const sentAt = process.hrtime.bigint();
  const { status, body } = await connection.request(text);
  const answeredAt = process.hrtime.bigint();
  return { status, body, sentAt: String(sentAt), answeredAt: String(answeredAt) };
}

serve({ load, sendOne });
