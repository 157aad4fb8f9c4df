import { type IncomingMessage } from 'node:http';

/**
 * Every value that a request has for a header, whose name is given in lower case. Node keeps one of several, and its
 * own `headersDistinct` throws in some versions when a header is called `__proto__`.
 */
export function headerValues({ rawHeaders }: IncomingMessage, name: string): string[] {
  const values: string[] = [];
  for (let index = 0; index < rawHeaders.length; index += 2) {
    if (rawHeaders[index]?.toLowerCase() === name) values.push(rawHeaders[index + 1] ?? '');
  }
  return values;
}
