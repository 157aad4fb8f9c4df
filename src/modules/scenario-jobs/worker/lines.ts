import { type Readable } from 'node:stream';

/** Calls back for each line, cut to `most` characters. Never holds more than a line, and never stops reading. */
export function readLines(source: Readable, most: number, onLine: (line: string) => void): void {
  let rest = '';
  const append = (text: string) => {
    if (rest.length < most) rest += text.slice(0, most - rest.length);
  };
  const end = () => {
    if (rest !== '') onLine(rest);
    rest = '';
  };
  source.setEncoding('utf8');
  source.on('data', (chunk: string) => {
    const [first = '', ...others] = chunk.split('\n');
    append(first);
    for (const line of others) {
      end();
      append(line);
    }
  });
  source.on('close', end);
  source.on('error', () => undefined);
}
