import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { type DestinationStream, pino } from 'pino';
import { within } from './within';

const STDOUT = 1;
const PAGE_LENGTH = 4096;
const MOST_MS = 100;
/** How long the end of a process waits for a slow reader. */
const LAST_LINES_MS = 2000;

/**
 * Standard output for a log. Each line is written at once or, with `gathered`, when there is a page of them or they are
 * a tenth of a second old. A slow reader delays only the end of the process, and only briefly. A fatal line has
 * everything that is left written at once; a process that is killed loses it. pino's own buffer never lets a process
 * end if nobody reads its output any more, and without that buffer pino flushes nothing.
 */
export function logOutput({
  gathered,
  format = (line) => line,
}: {
  gathered: boolean;
  format?: ((line: string) => string) | undefined;
}): DestinationStream & { flush(done: () => void): void; flushSync(): void } {
  // While this much waits for a reader, further lines are dropped.
  const output = pino.destination({ dest: STDOUT, sync: false, maxLength: 16 * 1024 * 1024 });
  output.on('error', () => {
    // Perhaps a full disk: what cannot be written is lost, and the process goes on. pino would retry forever when the
    // process ends.
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
      // Nobody reads the output any more.
    }
  };
  if (gathered) setInterval(write, MOST_MS).unref();
  process.on('exit', writeNow);
  return {
    write(line) {
      lines += format(line);
      if (!gathered || lines.length >= PAGE_LENGTH) write();
    },
    flush(done) {
      // Even an empty text is written, so that there is a `drain` event to wait for.
      const written = once(output, 'drain');
      output.write(take());
      void within(LAST_LINES_MS, 'last lines', written).then(done, () => done());
    },
    flushSync: writeNow,
  };
}
