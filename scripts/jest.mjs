// Runs Jest in a group of its own: a signal that ends the script ends Jest and everything that its tests have started.
import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { root } from './prepare.mjs';

/** Resolves with the exit code and, if `quiet`, with what Jest printed. */
export function runJest(args, { environment = {}, quiet = false } = {}) {
  const output = quiet ? 'pipe' : 'inherit';
  const jest = spawn(process.execPath, [join(root, 'node_modules/jest/bin/jest.js'), ...args], {
    cwd: root,
    env: { ...process.env, ...environment },
    stdio: ['ignore', output, output],
    detached: true,
  });
  let printed = '';
  for (const stream of [jest.stdout, jest.stderr]) stream?.on('data', (text) => (printed += text));
  let status;
  const end = (code) => () => {
    // The second signal kills without asking; the next run ends whatever is then left of the servers.
    process.kill(-jest.pid, status === undefined ? 'SIGTERM' : 'SIGKILL');
    // Processes that a test has frozen receive the signal only now.
    process.kill(-jest.pid, 'SIGCONT');
    status = code;
  };
  const handlers = { SIGINT: end(130), SIGTERM: end(143), SIGHUP: end(129) };
  for (const [signal, handler] of Object.entries(handlers)) process.on(signal, handler);
  return new Promise((resolve) =>
    jest.on('close', (code) => {
      if (status !== undefined) process.exit(status);
      for (const [signal, handler] of Object.entries(handlers)) process.off(signal, handler);
      resolve({ code: code ?? 1, output: printed });
    }),
  );
}
