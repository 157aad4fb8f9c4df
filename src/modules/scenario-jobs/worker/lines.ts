import { type Readable } from 'node:stream';

/**
 * Calls back for each line, an empty one too, cut to `most` characters. Never holds more than a line, and never stops
 * reading; but once `onLine` returns false no line is looked for any more: whoever writes without end must not keep us
 * from all else.
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
