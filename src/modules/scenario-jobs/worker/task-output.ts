import { type ChildProcess } from 'node:child_process';
import { readLines } from './lines';

/** Called with each line that a task prints. */
export type OnOutput = (line: string, stream: 'stdout' | 'stderr') => void;

/** What is known of all that a task has printed. */
export type TaskOutput = {
  /** Whether V8 has printed that it is out of memory; or the task itself has, which nothing prevents. */
  saysOutOfMemory: boolean;
};

const MAX_LINE = 4096;
/** How much one run may print into the log. */
const MAX_OUTPUT = 64 * 1024;
const OUT_OF_MEMORY = /JavaScript heap out of memory|Allocation failed/;

/** Passes on what a task prints, line by line, until it is too much for the log. */
export function watchOutput(child: ChildProcess, onOutput: OnOutput): TaskOutput {
  let budget = MAX_OUTPUT;
  for (const stream of ['stdout', 'stderr'] as const) {
    const source = child[stream];
    if (!source) continue;
    readLines(source, MAX_LINE, (line) => {
      if (budget <= 0) return false;
      budget -= line.length + 1;
      if (line === '') return;
      onOutput(line, stream);
      if (budget > 0) return;
      onOutput(`… the task has printed ${MAX_OUTPUT / 1024} KiB, the rest is dropped`, stream);
      return false;
    });
  }
  // Looked for however much the task has printed before.
  const output = { saysOutOfMemory: false };
  let before = '';
  child.stderr?.on('data', (chunk: string) => {
    const text = before + chunk;
    if (OUT_OF_MEMORY.test(text)) output.saysOutOfMemory = true;
    before = text.slice(-OUT_OF_MEMORY.source.length);
  });
  return output;
}
