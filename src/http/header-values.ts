import { type IncomingMessage } from 'node:http';

/**
 * Every value that a request has for a header; `name` is in lower case. Node keeps only one of several values, and its
 * own `headersDistinct` throws in some versions if a header is called `__proto__`.
 */
export function headerValues({ rawHeaders }: IncomingMessage, name: string): string[] {
  const values: string[] = [];
  for (let index = 0; index < rawHeaders.length; index += 2) {
    if (rawHeaders[index]?.toLowerCase() === name) values.push(rawHeaders[index + 1] ?? '');
  }
  return values;
}
