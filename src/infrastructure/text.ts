/** Whether Postgres can store the text: it takes neither NUL nor half a surrogate pair. */
export function isStorable(text: string): boolean {
  return text.isWellFormed() && !text.includes('\0');
}

/** Whether it has at most so many characters: code points. Of a text that is far too long nothing is counted. */
export function isAtMost(text: string, most: number): boolean {
  return text.length <= 2 * most && [...text].length <= most;
}

/** The text up to this length, and no half of a character in it. */
export function truncate(text: string, most: number): string {
  const cut = text.length > most ? text.slice(0, most).replace(/[\ud800-\udbff]$/, '') : text;
  return cut.toWellFormed();
}

/** The text, with a replacement character for each thing in it that Postgres cannot store. */
export function storable(text: string): string {
  return text.toWellFormed().replaceAll('\0', '\ufffd');
}
