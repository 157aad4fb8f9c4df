import { hash, randomInt } from 'node:crypto';

const PREFIX = 'exec_live_';
const SECRET_LENGTH = 40;
const ALPHABET = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789';
const BEARER = /^bearer +(exec_live_[A-Za-z0-9]{40})$/i;

/** A new key: `exec_live_` and 40 alphanumeric characters, 238 bits of randomness. */
export function newApiKey(): string {
  let key = PREFIX;
  while (key.length < PREFIX.length + SECRET_LENGTH) key += ALPHABET.charAt(randomInt(ALPHABET.length));
  return key;
}

/**
 * What is stored of a key: its SHA-256, in hexadecimal. The key is long and random, so a slow hash would add nothing;
 * and it is looked up by its hash, so no comparison can be timed.
 */
export function hashApiKey(key: string): string {
  return hash('sha256', key);
}

/** Whether a text that must not contain an API key seems to contain one. */
export function holdsApiKey(text: string): boolean {
  return text.includes(PREFIX);
}

/** The key in an `Authorization` header, or undefined if the header is not well formed. */
export function parseAuthorization(header: string | undefined): string | undefined {
  const key = header?.match(BEARER)?.[1];
  // The scheme may be written in any case (RFC 9110), the key may not.
  return key?.startsWith(PREFIX) ? key : undefined;
}
