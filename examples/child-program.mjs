// A task that runs another program, which ends when the job is cancelled.
// Run it with SCENARIO_TASK=examples/child-program.mjs npm run up
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';

const run = promisify(execFile);

export default async function childProgram({ prompt }, { signal }) {
  // A cancel sends it SIGTERM. If it goes on all the same, or has started others, they are killed with this process.
  const { stdout } = await run('sh', ['-c', 'sleep 2; printf "%s" "$1" | wc -w', 'sh', prompt], { signal });
  return { name: 'Counted words', words: Number(stdout) };
}
