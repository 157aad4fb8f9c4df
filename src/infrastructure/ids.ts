import { randomInt } from 'node:crypto';

const LETTERS = 'abcdefghijklmnopqrstuvwxyz';
const ALPHABET = `${LETTERS}0123456789`;
const LENGTH = 12;

/**
 * A new public id: 12 characters of `a-z0-9`, like `j1o2b3i4d5x6`. The first is a letter, because BullMQ refuses a
 * numeric job id.
 */
export function newId(): string {
  let id = LETTERS.charAt(randomInt(LETTERS.length));
  while (id.length < LENGTH) id += ALPHABET.charAt(randomInt(ALPHABET.length));
  return id;
}

/** Whether a text can be one of our ids. */
export function isId(text: string): boolean {
  return /^[a-z0-9]{12}$/.test(text);
}
