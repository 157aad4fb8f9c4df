/** Paths of both processes that machines request every few seconds, without a key. */
export const PROBES = ['/livez', '/readyz', '/metrics'];
