// Values of `NODE_OPTIONS` that make a process of the service misbehave. Several are joined by a space.

const preload = (code: string) => `--import=data:text/javascript,${encodeURIComponent(code)}`;

/** The process starts its own processes with this program instead of Node's. */
export const startsItsOwnWith = (program: string) => preload(`process.execPath='${program}'`);

/** The clock of the process is ahead by so many milliseconds, or behind if they are negative. */
export const clockAheadBy = (ms: number) => preload(`const now = Date.now; Date.now = () => now() + ${ms}`);
