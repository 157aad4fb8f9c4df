import { setTimeout as sleep } from 'node:timers/promises';
import { API_ERRORS, type ApiErrorCode } from '../../../src/http/api-error';
import { parseAnswers, type RawAnswer, RawConnection } from '../../support/raw-http';
import { type Request } from './requests';

/** Longer than the service may take for anything, including the arrival of a request. */
const DEADLINE_MS = 40_000;
/** A server that has been silent for this long waits for the rest of what it takes for a request. */
const IDLE_MS = 150;

export type Conversation = {
  pieces: Buffer[];
  pauseMs?: number;
  requests: Request[];
  /**
   * Whether each request is complete, so that it must be answered without further bytes or the end of the connection.
   */
  complete: boolean;
  /** How many of the requests, from the first, must each have an answer of its own. */
  owned: number;
};

/** A connection that its caller cuts. */
export type Cut = { cut: Buffer; afterMs: number };

/** Sends the pieces and returns every answer once the connection is closed. Fails if it never is. */
export async function converse(url: string, conversation: Conversation) {
  const { pieces, pauseMs = 0, requests } = conversation;
  const connection = new RawConnection(url);
  const methods = requests.map(({ method }) => method);
  try {
    for (const piece of pieces) {
      connection.send(piece);
      if (pauseMs > 0) await sleep(pauseMs);
    }
    await untilClosed(connection, () => parseAnswers(connection.received, methods).answers.length, conversation);
    return parseAnswers(connection.received, methods);
  } finally {
    connection.cut();
  }
}

async function untilClosed(
  connection: RawConnection,
  count: () => number,
  { requests, complete, owned }: Conversation,
) {
  const began = Date.now();
  let finished = false;
  for (let seen = 0, heardAt = began; !connection.closed; await sleep(1)) {
    if (connection.received.length !== seen) {
      seen = connection.received.length;
      heardAt = Date.now();
      if (!finished && count() >= requests.length) {
        connection.finish();
        finished = true;
      }
    }
    // Only now: a client that closes its sending side in the middle of a request gets no answer to that request.
    if (!finished && !complete && Date.now() - heardAt > IDLE_MS && count() >= owned) {
      connection.finish();
      finished = true;
    }
    if (Date.now() - began > DEADLINE_MS) throw new Error(`neither answered nor closed within ${DEADLINE_MS} ms`);
  }
}

/** Checks what must be true of every answer, whatever was asked. */
function checkAnswer({ status, headers, body }: RawAnswer, method: string): void {
  if (status >= 500) throw new Error(`answered ${status}: ${body}`);
  if (!headers['x-request-id']?.[0]) throw new Error(`an answer ${status} without a request id`);
  if (status < 400) return;
  const contentType = headers['content-type']?.join();
  if (!/^application\/json(; charset=utf-8)?$/.test(contentType ?? '')) {
    throw new Error(`an error ${status} of type ${contentType}: ${body}`);
  }
  if (method !== 'HEAD') checkEnvelope(status, body);
}

type Answers = ReturnType<typeof parseAnswers>;

function checkEnvelope(status: number, body: string): void {
  const { error, ...more } = JSON.parse(body) as { error: Record<string, unknown> };
  const { type, code, message, ...others } = error;
  const known = API_ERRORS[code as ApiErrorCode] as { status: number; type: string } | undefined;
  if (known?.status !== status || known.type !== type || typeof message !== 'string' || message === '') {
    throw new Error(`an answer ${status} with an error that is not documented: ${body}`);
  }
  if (Object.keys(more).length + Object.keys(others).length > 0) throw new Error(`more than the envelope: ${body}`);
}

/** Checks everything that must be true of the answers to a conversation. */
export function checkAnswers({ requests, complete, owned }: Conversation, { answers, rest }: Answers): void {
  answers.forEach((answer, index) => checkAnswer(answer, requests[index]?.method ?? ''));
  const least = complete ? requests.length : owned;
  // Part of a wrong request can be taken for the beginning of another one, which is then refused.
  const most = complete ? requests.length : requests.length + 1;
  if (answers.length < least || answers.length > most) {
    throw new Error(`${answers.length} answers to ${requests.length} requests; then: ${rest.toString()}`);
  }
  requests.slice(0, owned).forEach((request, index) => checkOwner(answers[index]!, request));
  const order = answers.map(({ headers }) => requests.findIndex(({ id }) => id === headers['x-request-id']?.[0]));
  const known = order.filter((index) => index >= 0);
  if (known.some((index, at) => at > 0 && index <= known[at - 1]!))
    throw new Error(`answers out of order: ${order.join()}`);
}

/** Checks that the answer belongs to this request: it has its id and, if it asked about a job, names that job. */
function checkOwner(answer: RawAnswer, { id, method, target }: Request): void {
  if (answer.headers['x-request-id']?.[0] !== id) {
    throw new Error(`${method} ${target} got an answer to another request: ${answer.status} ${answer.body}`);
  }
  const jobId = /\/jobs\/(\w+)$/.exec(target)?.[1];
  const { id: answered, error } = JSON.parse(answer.body) as { id?: string; error?: { code: string; message: string } };
  if (!jobId || error?.code === 'job_not_cancellable') return;
  if (answered !== jobId && !error?.message.includes(jobId)) {
    throw new Error(`${method} ${target} got an answer about another job: ${answer.body}`);
  }
}
