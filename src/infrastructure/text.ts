/** Whether Postgres can store the text: it takes neither NUL nor half a surrogate pair. */
export function isStorable(text: string): boolean {
  return text.isWellFormed() && !text.includes('\0');
}

/** Whether the text has at most `most` characters (code points). A text that is far too long is not even counted. */
export function isAtMost(text: string, most: number): boolean {
  return text.length <= 2 * most && [...text].length <= most;
}

/** The text cut to at most this length, without splitting a character. */
export function truncate(text: string, most: number): string {
  const cut = text.length > most ? text.slice(0, most).replace(/[\ud800-\udbff]$/, '') : text;
  return cut.toWellFormed();
}

/** The text, with a replacement character for everything in it that Postgres cannot store. */
export function storable(text: string): string {
  return text.toWellFormed().replaceAll('\0', '\ufffd');
}
