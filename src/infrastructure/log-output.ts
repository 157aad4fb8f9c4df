import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { type DestinationStream, pino } from 'pino';
import { within } from './within';

const STDOUT = 1;
const PAGE_LENGTH = 4096;
const MOST_MS = 100;
/** How long the end of a process waits for a reader that is slow. */
const LAST_LINES_MS = 2000;

/**
 * Standard output for a log. Each line is written at once; or, where there are many, `gathered`: once there is a page
 * of them, or they are a tenth of a second old. A slow reader holds up nothing but the end of the process, for a
 * moment. What is left at a fatal line is written at once; a process that is killed loses it. pino's own buffer never
 * lets a process end whose output nobody reads any more, and without one pino flushes nothing.
 */
export function logOutput({
  gathered,
}: {
  gathered: boolean;
}): DestinationStream & { flush(done: () => void): void; flushSync(): void } {
  // What comes while that much waits for a reader is dropped.
  const output = pino.destination({ dest: STDOUT, sync: false, maxLength: 16 * 1024 * 1024 });
  output.on('error', () => {
    // A full disk, perhaps: what does not find room is lost, and the process goes on. At its end pino would try for
    // ever.
    output.flushSync = () => undefined;
  });
  let lines = '';
  const take = () => {
    const taken = lines;
    lines = '';
    return taken;
  };
  const write = () => {
    if (lines !== '') output.write(take());
  };
  const writeNow = () => {
    try {
      writeFileSync(STDOUT, take());
    } catch {
      // Nobody reads any more.
    }
  };
  if (gathered) setInterval(write, MOST_MS).unref();
  process.on('exit', writeNow);
  return {
    write(line) {
      lines += line;
      if (!gathered || lines.length >= PAGE_LENGTH) write();
    },
    flush(done) {
      // An empty text goes the same way, so that there is an end to wait for.
      const written = once(output, 'drain');
      output.write(take());
      void within(LAST_LINES_MS, 'last lines', written).then(done, () => done());
    },
    flushSync: writeNow,
  };
}
