import { type Readable } from 'node:stream';

/**
 * Calls `onLine` for each line, even an empty one, cut to `most` characters. Never holds more than one line, and never
 * stops reading; but once `onLine` returns false, lines are no longer looked for: an endless writer must not keep this
 * process from everything else.
 */
export function readLines(source: Readable, most: number, onLine: (line: string) => void | false): void {
  let wanted = true;
  let rest = '';
  const append = (text: string) => {
    if (rest.length < most) rest += text.slice(0, most - rest.length);
  };
  const end = () => {
    if (wanted) wanted = onLine(rest) !== false;
    rest = '';
  };
  source.setEncoding('utf8');
  source.on('data', (chunk: string) => {
    if (!wanted) return;
    const [first = '', ...others] = chunk.split('\n');
    append(first);
    for (const line of others) {
      end();
      if (!wanted) return;
      append(line);
    }
  });
  source.on('close', () => {
    if (rest !== '') end();
  });
  source.on('error', () => undefined);
}
