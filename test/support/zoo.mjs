// Every kind of task, chosen by the first word of the prompt: kind ones, rude ones, broken ones. Each first prints
// "running" and its process id, so that a test knows that it has begun.
import { spawn, spawnSync } from 'node:child_process';
import { closeSync, existsSync, readdirSync, readFileSync, readlinkSync, writeSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

// Written at once, even by a task that never yields.
const say = (text) => writeSync(1, `${text}\n`);
const spin = () => {
  for (;;);
};
/** Writes on the channel between this process and its worker, until the worker has taken everything. */
const tellLine = (line) => {
  for (let rest = Buffer.from(line); rest.length > 0;) {
    try {
      rest = rest.subarray(writeSync(3, rest));
    } catch (error) {
      if (error.code !== 'EAGAIN') throw error;
    }
  }
};
const tell = (message) => tellLine(`${JSON.stringify(message)}\n`);
const forever = () => sleep(2 ** 30);

const species = {
  /** Makes a scenario at once. */
  quick: () => ({ name: 'Quick scenario', persona: 'Ada' }),
  /** Makes a scenario, and leaves a process behind that holds its output and hides. */
  hider: async () => {
    const child = spawn('sleep', ['1000'], { detached: true, env: {}, stdio: ['ignore', 'inherit', 'inherit'] });
    say(`child ${child.pid}`);
    return { name: 'Left alone' };
  },
  /** Makes a scenario after as many milliseconds as its second word says. */
  slow: async (_input, { signal }, ms) => {
    await sleep(Number(ms), undefined, { signal });
    return { name: 'Slow scenario' };
  },
  /** Makes a scenario once there is a file of this name. */
  patient: async (_input, { signal }, file) => {
    while (!existsSync(file)) await sleep(20, undefined, { signal });
    return { name: 'Patient scenario' };
  },
  /** Stops when it is asked to. */
  cooperative: (_input, { signal }) => sleep(2 ** 30, undefined, { signal }),
  /** Stops when it is asked to, and says why it was. */
  curious: async (_input, { signal }) => {
    await sleep(2 ** 30, undefined, { signal }).catch(() => undefined);
    say(`stopped by ${signal.reason.name}: ${signal.reason.cause}`);
  },
  /** Stops when it is asked to, after cleaning up for as many milliseconds as its second word says. */
  tidy: async (_input, { signal }, ms = 50) => {
    await sleep(2 ** 30, undefined, { signal }).catch(() => undefined);
    await sleep(Number(ms));
    say('tidied');
  },
  /** Stops when it is asked to, and prints more at once than a pipe holds. */
  talkative: async (_input, { signal }) => {
    await sleep(2 ** 30, undefined, { signal }).catch(() => undefined);
    process.stdout.write(`${'x'.repeat(2 ** 20)}\n`);
    console.log('last words');
  },
  /** Stops when it is asked to, and has exit handlers, one of which fails. */
  careful: (_input, { signal }) => {
    process.on('unhandledRejection', () => say('unhandled'));
    process.on('exit', () => say('the first exit handler has run'));
    process.on('exit', () => {
      throw new Error('the second exit handler has failed');
    });
    return sleep(2 ** 30, undefined, { signal });
  },
  /** Stops when it is asked to, and has an exit handler that takes its time. */
  thorough: (_input, { signal }) => {
    process.on('exit', () => {
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 2000);
      say('everything is put away');
    });
    return sleep(2 ** 30, undefined, { signal });
  },
  /** Stops when it is asked to, and fails to clean up. */
  untidy: async (_input, { signal }) => {
    await sleep(2 ** 30, undefined, { signal }).catch(() => undefined);
    throw new Error('left a file behind');
  },
  /** Returns a scenario although it was asked to stop. */
  late: async (_input, { signal }) => {
    await sleep(2 ** 30, undefined, { signal }).catch(() => undefined);
    return { name: 'Late scenario' };
  },
  /** Acknowledges the stop and goes on. */
  deaf: forever,
  /** Computes without yielding. */
  spin,
  /** Ignores SIGTERM, and yields. */
  stubborn: forever,
  /** Ignores SIGTERM, and computes without yielding. */
  stubbornSpin: spin,
  /** Acknowledges again and again, and ignores SIGTERM. */
  nodding: () => {
    setInterval(() => tell({ kind: 'acknowledged' }), 100);
    return forever();
  },
  /** Blocks, waiting for a child that SIGTERM ends; ignores SIGTERM itself, and only then acknowledges. */
  belated: () => {
    spawnSync('sleep', ['1000']);
    return forever();
  },
  /** Blocks its thread in a system call. */
  blocked: () => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0),
  /** Has a child that ignores SIGTERM. */
  parent: async () => {
    const child = spawn('sh', ['-c', 'trap "" TERM; echo ready; while :; do sleep 1; done'], {
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    await new Promise((resolve) => child.stdout.once('data', resolve));
    say(`child ${child.pid}`);
    return forever();
  },
  /** Makes a scenario, and has an exit handler that takes its time. */
  lingering: () => {
    process.on('exit', () => {
      say('lingers');
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 700);
    });
    return { name: 'Lingering scenario' };
  },
  /** Has a child in a session of its own. */
  daemon: async () => {
    const child = spawn('sleep', ['1000'], { detached: true, stdio: 'ignore' });
    await new Promise((resolve) => child.once('spawn', resolve));
    child.unref();
    say(`child ${child.pid}`);
    return forever();
  },
  /** Leaves a daemon behind and succeeds. */
  litterer: async () => {
    const child = spawn('sleep', ['1000'], { detached: true, stdio: 'ignore' });
    await new Promise((resolve) => child.once('spawn', resolve));
    child.unref();
    say(`child ${child.pid}`);
    return { name: 'Littered scenario' };
  },
  memory: async () => {
    const held = [];
    for (;;) {
      held.push(new Array(100_000).fill({}).map(() => ({ value: Math.random() })));
      await sleep(1);
    }
  },
  flood: async () => {
    for (let line = 0; line < 20_000; line++) process.stdout.write(`${'x'.repeat(200)} ${line}\n`);
    return { name: 'Loud scenario' };
  },
  /** Prints more than is logged, and then does what its second word says. */
  loud: (input, tools, kind) => {
    for (let line = 0; line < 2000; line++) console.error('x'.repeat(100));
    return species[kind](input, tools);
  },
  /** Has a child that prints without end, and waits. */
  torrent: (_input, { signal }) => {
    const child = spawn('yes', { stdio: ['ignore', 'inherit', 'inherit'] });
    return new Promise((resolve) => {
      signal.addEventListener('abort', () => child.kill('SIGKILL') && resolve());
    });
  },
  progressFlood: async (_input, { progress }) => {
    for (let done = 0; done < 100_000; done++) progress({ done });
    await sleep(1500);
    return { name: 'Busy scenario' };
  },
  /** Reports its progress a hundred times, and then makes a scenario. */
  reporting: async (_input, { progress }) => {
    for (let done = 0; done < 100; done++) {
      progress({ done });
      await sleep(20);
    }
    return { name: 'Reported scenario' };
  },
  exitEarly: () => process.exit(0),
  exitBadly: () => process.exit(3),
  /** Prints the words that V8 uses when it is out of memory. */
  complainer: () => {
    console.error('Allocation failed for tenant 7');
    process.exit(3);
  },
  crash: () => {
    setTimeout(() => {
      throw new Error('boom');
    });
    return forever();
  },
  killItself: (_input, _tools, signal = 'SIGKILL') => {
    process.kill(process.pid, signal);
    return forever();
  },
  throws: () => {
    throw new Error('secret path /etc/secret');
  },
  throwsString: () => {
    throw 'just a string';
  },
  throwsNothing: () => {
    throw undefined;
  },
  policy: () => {
    throw Object.assign(new Error('The prompt is not allowed'), { code: 'CONTENT_POLICY_VIOLATION', expose: true });
  },
  /** Fails with a message that is longer than a caller is told. */
  wordy: () => {
    throw Object.assign(new Error('x'.repeat(1500)), { code: 'CONTENT_POLICY_VIOLATION', expose: true });
  },
  /** Fails with a code that is not a valid one. */
  badCode: () => {
    throw Object.assign(new Error('The prompt is not allowed'), { code: 'bad code', expose: true });
  },
  /** Fails with a message that Postgres does not store. */
  unstorable: () => {
    throw Object.assign(new Error('Not \0 allowed'), { code: 'CONTENT_POLICY_VIOLATION', expose: true });
  },
  /** Fails with an error that may pass. */
  flaky: () => {
    throw Object.assign(new Error('try again'), { retryable: true });
  },
  /** Fails with the error code that its second word gives. */
  throwsCode: (_input, _tools, code) => {
    throw Object.assign(new Error('something went wrong'), { code });
  },
  /** Fails with a network error of which it says that it will not pass. */
  hopeless: () => {
    throw Object.assign(new Error('reset for good'), { code: 'ECONNRESET', retryable: false });
  },
  /** Calls a port of this host on which nothing listens. */
  refused: (_input, { signal }) => fetch('http://localhost:2', { signal }),
  /** The same, and whatever else it might call: the error names each failure, and has no code itself. */
  refusedEverywhere: (_input, { signal }) => Promise.any([fetch('http://localhost:2', { signal })]),
  /** Waits for something for a millisecond only. */
  impatient: () => sleep(2 ** 30, undefined, { signal: AbortSignal.timeout(1) }),
  nothing: () => undefined,
  nameless: () => ({ persona: 'nobody' }),
  blankName: () => ({ name: ' \t' }),
  /** Makes a scenario whose name has as many characters as its second word says. */
  named: (_input, _tools, length) => ({ name: 'x'.repeat(Number(length)) }),
  list: () => ['a list'],
  nul: () => ({ name: 'Bad text', note: 'nul \0' }),
  nulKey: () => ({ name: 'Bad text', notes: { 'nul \0': 1 } }),
  bigint: () => ({ name: 'Big', size: 10n }),
  circular: () => {
    const result = { name: 'Round' };
    result.self = result;
    return result;
  },
  megabyte: () => ({ name: 'Large', text: 'x'.repeat(900_000) }),
  tooLarge: () => ({ name: 'Too large', text: 'x'.repeat(1_100_000) }),
  /** Returns its environment as the scenario's content. */
  environment: () => ({ name: 'Environment', environment: process.env }),
  /** Counts the TCP connections it has inherited: those of its open files that the system lists as such. */
  connections: () => {
    const links = readdirSync('/proc/self/fd').flatMap((fd) => {
      try {
        return [readlinkSync(`/proc/self/fd/${fd}`)];
      } catch {
        return []; // The descriptor with which the folder was read.
      }
    });
    const tables = ['tcp', 'tcp6'].map((name) => readFileSync(`/proc/self/net/${name}`, 'utf8')).join();
    const inodes = new Set(tables.split('\n').map((line) => line.trim().split(/\s+/)[9]));
    const sockets = links.flatMap((link) => /^socket:\[(\d+)\]$/.exec(link)?.[1] ?? []);
    return { name: 'Connections', sockets: sockets.length, tcp: sockets.filter((inode) => inodes.has(inode)).length };
  },
  /** Reports its progress once, then waits. */
  reporter: async (_input, { signal, progress }) => {
    progress({ step: 'half', done: 1, of: 2 });
    await sleep(2 ** 30, undefined, { signal });
  },
  /** Sends messages of its own on the channel of its process. */
  chatter: async () => {
    const strange = [
      null,
      'hello',
      1,
      [],
      {},
      { kind: 'no such' },
      { kind: 'returned', result: 5 },
      { kind: 'threw' },
      { kind: 'threw', error: {} },
    ];
    for (const message of strange) tell(message);
    tellLine('no JSON\n\n');
    await sleep(50);
    return { name: 'Chatty scenario' };
  },
  /** Sends results and errors that no task may send, and more than a message can hold. */
  boaster: async () => {
    tell({ kind: 'returned', result: JSON.stringify({ name: 'Forged', text: 'x'.repeat(1_100_000) }) });
    tell({ kind: 'threw', error: { code: 'not a code', message: 'forged', retryable: false } });
    tell({ kind: 'threw', error: { code: 'FORGED', message: 'x'.repeat(1001), retryable: false } });
    tell({ kind: 'returned', result: JSON.stringify({ name: 'Forged', text: 'x'.repeat(5_000_000) }) });
    await sleep(50);
    return { name: 'True scenario' };
  },
  /** Sends the same line without end. */
  babbler: async (_input, _tools, line = 'x') => {
    const lines = `${line}\n`.repeat(65_536 / (line.length + 1));
    for (;;) {
      tellLine(lines);
      await sleep(0);
    }
  },
  /** Throws a value that itself throws when it is read. */
  mine: () => {
    const explode = () => {
      throw new Error('looked at');
    };
    throw new Proxy({}, { get: explode, ownKeys: explode, getPrototypeOf: explode });
  },
  /** Throws errors within errors without end. */
  mirrors: () => {
    const error = new AggregateError([], 'mirrors');
    error.errors = Array(300).fill(error);
    throw error;
  },
  /** Closes the channel between this process and its worker. */
  silent: () => {
    closeSync(3);
    return forever();
  },
  /** Reports progress that cannot be passed on. */
  unpresentable: async (_input, { progress }) => {
    progress(1n);
    progress({ text: 'x'.repeat(10_000) });
    await sleep(50);
    return { name: 'Quiet scenario' };
  },
  /** Reports that it has returned something that is not JSON. */
  forger: () => {
    tell({ kind: 'returned', result: '{broken' });
    return forever();
  },
  input: (input) => ({ name: 'Input', input }),
};

/** What these do on SIGTERM; installed before they print "running". */
const onSigterm = {
  stubborn: () => say('ignored SIGTERM'),
  stubbornSpin: () => undefined,
  nodding: () => undefined,
  belated: () => undefined,
};

export default async function zoo(input, tools) {
  const [kind, argument] = input.prompt.split(' ');
  if (Object.hasOwn(onSigterm, kind)) process.on('SIGTERM', onSigterm[kind]);
  say(`running ${process.pid}`);
  if (!Object.hasOwn(species, kind)) throw new Error(`unknown species ${kind}`);
  return species[kind](input, tools, argument);
}
