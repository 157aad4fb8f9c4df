/** What both processes are asked every few seconds by machines, without a key. */
export const PROBES = ['/livez', '/readyz', '/metrics'];
