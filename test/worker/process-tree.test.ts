import { type ChildProcess, fork, spawn, spawnSync } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import fs from 'node:fs/promises';
import { killTrees, livingMembers } from '../../src/modules/scenario-jobs/worker/process-tree';
import { RUN_ID_VARIABLE } from '../../src/modules/scenario-jobs/worker/running-processes';
import { eventually } from '../support/eventually';
import { DIST } from '../support/service-process';
import { isAlive } from '../support/test-system';

/**
 * All processes of the machine are read, so the names differ from those of another run of these tests beside this one.
 */
const OWN = randomUUID();

/** A process that leads a group of its own, like a task. */
function startGroup(runId: string, program: string, ...args: string[]): ChildProcess {
  return startGroupWith({}, runId, program, ...args);
}

function startGroupWith(more: NodeJS.ProcessEnv, runId: string, program: string, ...args: string[]): ChildProcess {
  const env = { PATH: process.env.PATH, ...more, [RUN_ID_VARIABLE]: runId };
  return spawn(program, args, { detached: true, stdio: 'ignore', env });
}

const hasEnded = ({ exitCode, signalCode }: ChildProcess) => exitCode !== null || signalCode !== null;

describe('killing what a task has started', () => {
  let folder: string;
  beforeAll(() => (folder = mkdtempSync(join(tmpdir(), 'process-tree-'))));
  afterAll(() => rmSync(folder, { recursive: true }));

  it('ends a chain of processes of which each starts the next one and exits', async () => {
    const trace = join(folder, 'trace');
    writeFileSync(trace, '');
    // Ends by itself eventually, should it not be killed.
    const script = 'next() { [ $1 -gt 0 ] && { printf x >> "$0"; next $(($1 - 1)) & }; }; next 100000';
    const { pid } = startGroup(`chain ${OWN}`, 'sh', '-c', script, trace);
    const length = () => readFileSync(trace).length;
    await eventually('the chain is under way', () => length() > 20);
    await killTrees([{ groupId: pid as number, runId: `chain ${OWN}` }]);
    const then = length();
    await sleep(200);
    expect(length()).toBe(then);
  });
});

describe('killing what has left the group of its task', () => {
  it('ends a chain of daemons of which each starts the next one and exits', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'process-tree-'));
    const trace = join(folder, 'trace');
    const link = join(folder, 'link.sh');
    writeFileSync(trace, '');
    writeFileSync(link, 'printf x >> "$1"\n[ "$2" -gt 0 ] && setsid sh "$0" "$1" $(($2 - 1)) &\n');
    const length = () => readFileSync(trace).length;
    startGroup(`daemons in a chain ${OWN}`, 'sh', link, trace, '2000');
    await eventually('the chain is under way', () => length() > 20);
    await killTrees([{ groupId: await groupOfNobody(), runId: `daemons in a chain ${OWN}` }]);
    const then = length();
    expect(then).toBeLessThan(2000);
    await sleep(200);
    expect(length()).toBe(then);
    rmSync(folder, { recursive: true });
  });

  it('looks once for all who ask at the same time', async () => {
    const left = await groupOfNobody();
    const looks = jest.spyOn(fs, 'readdir');
    await Promise.all(
      Array.from({ length: 50 }, (_, index) => killTrees([{ groupId: left, runId: `run ${index} ${OWN}` }])),
    );
    // Each caller needs two looks; for the second, some come too late for the look that has begun. A look lists all
    // processes, and then those that have begun meanwhile.
    const lists = looks.mock.calls.filter(([path]) => path === '/proc');
    expect(lists.length).toBeLessThan(50);
    looks.mockRestore();
  });

  it('misses nothing that begins while it looks', async () => {
    const runId = `daemons ${OWN}`;
    const left = await groupOfNobody();
    for (let times = 0; times < 40; times++) {
      // Somewhere in or before the first look, the parent leaves a daemon behind and ends.
      const parent = startGroup(runId, 'sh', '-c', `sleep ${times / 4000}; setsid sleep 60 &`);
      parent.unref();
      await sleep(5);
      await killTrees([{ groupId: left, runId }]);
      await sleep(20);
      expect(await livingMembers(new Set(), [runId])).toEqual([]);
    }
  });
});

describe('looking for what is left of a task', () => {
  const runId = `left ${OWN}`;
  const started: ChildProcess[] = [];
  const start = () => {
    const child = startGroup(runId, 'sleep', '60');
    started.push(child);
    return child.pid as number;
  };
  afterEach(() => {
    jest.restoreAllMocks();
    for (const child of started) child.kill('SIGKILL');
  });

  it('does not take one look that finds nothing for a proof', async () => {
    const groupId = await groupOfNobody();
    const pid = start();
    jest.spyOn(fs, 'readdir').mockResolvedValueOnce([]);
    await killTrees([{ groupId, runId }]);
    expect(isAlive(pid)).toBe(false);
  });

  it('nor one that meets a process which does not yet show what it is', async () => {
    const groupId = await groupOfNobody();
    const pid = start();
    const { readFile } = fs;
    let times = 3;
    jest.spyOn(fs, 'readFile').mockImplementation((path, options) => {
      const shows = path !== `/proc/${pid}/environ` || times-- <= 0;
      return shows ? readFile(path, options) : Promise.resolve(Buffer.alloc(0) as never);
    });
    await killTrees([{ groupId, runId }]);
    expect(isAlive(pid)).toBe(false);
  });

  it('says so when it can see nothing for long, and goes on looking', async () => {
    const groupId = await groupOfNobody();
    const pid = start();
    const tooMany = Object.assign(new Error('too many open files'), { code: 'EMFILE' });
    const readdir = jest.spyOn(fs, 'readdir').mockRejectedValue(tooMany);
    let now = 0;
    jest.spyOn(performance, 'now').mockImplementation(() => (now += 6000));
    let times = 0;
    await killTrees([{ groupId, runId }], () => {
      times++;
      readdir.mockRestore();
    });
    expect(times).toBe(1);
    expect(isAlive(pid)).toBe(false);
  });
});

/** The number of a group that has ended. */
async function groupOfNobody(): Promise<number> {
  const child = startGroup(`nobody ${OWN}`, 'true');
  await once(child, 'exit');
  return child.pid as number;
}

describe('a task that the system has no file descriptors for', () => {
  const script = `
    const { closeSync, openSync, writeSync } = require('node:fs');
    const { TaskProcess } = require('./modules/scenario-jobs/worker/task-process.js');
    const taken = [];
    try { for (;;) taken.push(openSync('/dev/null')); } catch {}
    const start = () => new TaskProcess({ runId: 'r', memoryMb: 64, inherit: [], onProgress() {}, onOutput() {},
      stop: { ackMs: 1, graceMs: 1, killMs: 1 } });
    (async () => {
      for (const free of [0, 2, 2]) {
        for (let count = 0; count < free; count++) closeSync(taken.pop());
        writeSync(1, (await start().ended).end.kind + '\\n');
      }
    })();`;

  it('is not started, and nothing else happens', () => {
    const { status, stdout, stderr } = spawnSync(
      'sh',
      ['-c', 'ulimit -n 40; exec "$0" -e "$1"', process.execPath, script],
      {
        cwd: DIST,
        encoding: 'utf8',
      },
    );
    expect({ status, stdout, stderr }).toEqual({ status: 0, stdout: 'not started\n'.repeat(3), stderr: '' });
  });
});

describe('killing with few file descriptors', () => {
  const script = `
    const { closeSync, openSync, writeSync } = require('node:fs');
    const { killTrees } = require('./modules/scenario-jobs/worker/process-tree.js');
    const taken = [];
    try { for (;;) taken.push(openSync('/dev/null')); } catch {}
    for (let free = 0; free < 4; free++) closeSync(taken.pop());
    killTrees([{ groupId: 2 ** 22, runId: '${OWN}' }]).then(() => writeSync(1, 'done'));`;

  it('comes to an end', () => {
    const args = ['-c', 'ulimit -n 40; exec "$0" -e "$1"', process.execPath, script];
    const { stdout, stderr } = spawnSync('sh', args, { cwd: DIST, encoding: 'utf8', timeout: 20_000 });
    expect({ stdout, stderr }).toEqual({ stdout: 'done', stderr: '' });
  });
});

describe('killing where /proc does not show our processes', () => {
  // A process of the tree that has left its group, and one that has not.
  const script = `
    const { spawn } = require('node:child_process');
    const { killTrees } = require('./modules/scenario-jobs/worker/process-tree.js');
    const env = { PATH: process.env.PATH, ${RUN_ID_VARIABLE}: '${OWN}' };
    const [left, stayed] = [1, 2].map(() => spawn('sleep', ['60'], { detached: true, stdio: 'ignore', env }));
    const ended = new Promise((resolve) => stayed.once('exit', (code, signal) => resolve(signal)));
    killTrees([{ groupId: stayed.pid, runId: '${OWN}' }]).then(async (survivors) => {
      console.log(survivors.length, await ended);
      left.kill('SIGKILL');
    });`;
  const run = (program: string, ...args: string[]) => {
    const { stdout, stderr } = spawnSync(program, args, { cwd: DIST, encoding: 'utf8', timeout: 20_000 });
    return { stdout, stderr };
  };
  const KILLED = { stdout: '0 SIGKILL\n', stderr: '' };

  it('ends the group where there is no /proc', () => {
    const without = `
      const missing = () => { throw Object.assign(new Error('ENOENT'), { code: 'ENOENT' }); };
      require('node:fs').readlinkSync = missing;
      require('node:fs/promises').readdir = async () => missing();`;
    expect(run(process.execPath, '-e', without + script)).toEqual(KILLED);
  });

  // Some systems let nobody but root make a PID namespace, or nobody at all.
  const inNamespace = ['--user', '--map-root-user', '--pid', '--fork'];
  const withNamespaces = spawnSync('unshare', [...inNamespace, 'true']).status === 0 ? describe : describe.skip;
  withNamespaces('but those of another PID namespace', () => {
    it('ends the group, and takes no stranger for its own', () => {
      expect(run('unshare', ...inNamespace, process.execPath, '-e', script)).toEqual(KILLED);
    });
  });
});

// Only root can become a user who may not kill root's processes.
const asRoot = process.getuid?.() === 0 ? describe : describe.skip;
asRoot('killing what is not ours to kill', () => {
  const script = `
    const { killTrees } = require('./modules/scenario-jobs/worker/process-tree.js');
    process.setgid(65534);
    process.setuid(65534);
    killTrees([{ groupId: Number(process.argv[1]), runId: 'a run ${OWN}' }]).then((left) => console.log(left.join()));`;

  it('comes to an end, and names what lives on', () => {
    const stranger = startGroup(`a run ${OWN}`, 'sleep', '60');
    try {
      const args = ['-e', script, String(stranger.pid)];
      const { stdout, stderr } = spawnSync(process.execPath, args, { cwd: DIST, encoding: 'utf8', timeout: 60_000 });
      expect({ stdout, stderr }).toEqual({ stdout: `${stranger.pid}\n`, stderr: '' });
      expect(isAlive(stranger.pid as number)).toBeTruthy();
    } finally {
      stranger.kill('SIGKILL');
    }
  });
});

describe('a watchdog', () => {
  let watchdog: ChildProcess;
  let tasks: ChildProcess[];
  const start = (count: number, environment: NodeJS.ProcessEnv = {}) => {
    watchdog = fork(join(DIST, 'main.watchdog.js'), ['600000', '[]'], {
      env: {},
      stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
      execArgv: ['--max-old-space-size=32'],
    });
    tasks = Array.from({ length: count }, (_, index) =>
      startGroupWith(environment, `run-${index} ${OWN}`, 'sleep', '60'),
    );
    for (const index of tasks.keys()) tell('watch', index);
  };
  const tell = (kind: 'watch' | 'forget', index: number) =>
    watchdog.send({ kind, tree: { groupId: tasks[index]!.pid, runId: `run-${index} ${OWN}` } });
  afterEach(() => {
    for (const task of [...tasks, watchdog]) task.kill('SIGKILL');
  });

  it('ends the tasks of a worker that has a great many, when it dies', async () => {
    start(150);
    watchdog.disconnect();
    await eventually('the watchdog has ended', () => hasEnded(watchdog));
    expect(watchdog.exitCode).toBe(0);
    await eventually('every task has ended', () => tasks.every(hasEnded));
  });

  it('ends what has left the groups of tasks, and has environments larger than itself', async () => {
    const texts = Array.from({ length: 12 }, (_, index) => [`TEXT_${index}`, 'x'.repeat(120_000)] as const);
    start(32, Object.fromEntries(texts));
    const groupId = await groupOfNobody();
    for (const index of tasks.keys()) watchdog.send({ kind: 'watch', tree: { groupId, runId: `run-${index} ${OWN}` } });
    watchdog.disconnect();
    await eventually('the watchdog has ended', () => hasEnded(watchdog));
    expect(watchdog.exitCode).toBe(0);
    await eventually('every task has ended', () => tasks.every(hasEnded));
  });

  it.each(['SIGINT', 'SIGTERM', 'SIGHUP'] as const)('does not end before its worker does: %s', async (signal) => {
    start(1);
    watchdog.send({ kind: 'heartbeat' });
    await once(watchdog, 'message');
    watchdog.kill(signal);
    // What comes behind the signal is answered as before.
    watchdog.send({ kind: 'heartbeat' });
    await Promise.race([once(watchdog, 'message'), once(watchdog, 'exit')]);
    expect(hasEnded(watchdog)).toBe(false);
    watchdog.disconnect();
    await eventually('the watchdog has ended', () => hasEnded(watchdog));
    await eventually('the task has ended', () => tasks.every(hasEnded));
  });

  it('leaves alone what it was told to forget', async () => {
    start(2);
    tell('forget', 0);
    watchdog.disconnect();
    await eventually('the watchdog has ended', () => hasEnded(watchdog));
    expect(tasks.map(({ pid }) => isAlive(pid as number))).toEqual([true, false]);
  });
});
