import { InvalidSettings, parseSettings } from './settings';

const REQUIRED = { DATABASE_URL: 'postgres://u:secret@host/db', REDIS_URL: 'redis://host' };

const faultsOf = (environment: Record<string, string>): string[] => {
  try {
    parseSettings(environment);
    return [];
  } catch (error) {
    if (error instanceof InvalidSettings) return error.faults;
    throw error;
  }
};

describe('settings', () => {
  it('need a database and a Redis, and have a default for everything else', () => {
    expect(faultsOf({})).toEqual(['DATABASE_URL is required', 'REDIS_URL is required']);
    expect(parseSettings(REQUIRED)).toMatchObject({ PORT: 3000, WORKER_CONCURRENCY: 4, LOG_LEVEL: 'info' });
  });

  it('take of the two addresses of localhost one', () => {
    expect(parseSettings({ ...REQUIRED, HOST: 'localhost' }).HOST).toBe('127.0.0.1');
    expect(parseSettings({ ...REQUIRED, HOST: '::1' }).HOST).toBe('::1');
  });

  it('take a variable that is set to nothing for one that is not set', () => {
    expect(parseSettings({ ...REQUIRED, PORT: '', SCENARIO_TASK: '' })).toMatchObject({
      PORT: 3000,
      SCENARIO_TASK: undefined,
    });
  });

  it.each([
    ['DATABASE_URL', 'mysql://u:secret@host/db', 'must be a postgres:// URL'],
    ['DATABASE_URL', 'postgres:foo', 'must be a postgres:// URL'],
    ['DATABASE_URL', 'postgres://u:100%@host/db', 'must have %25 where a name or password has %'],
    ['REDIS_URL', 'not a URL', 'must be a redis:// or rediss:// URL'],
    ['REDIS_URL', 'redis:foo', 'must be a redis:// or rediss:// URL'],
    ['REDIS_URL', 'redis://:100%@host', 'must have %25 where a name or password has %'],
    ['REDIS_URL', 'redis://host/name', 'must name its database by a number'],
    ['PORT', '65536', 'must be at most 65535'],
    ['PORT', '3000x', 'must be a whole number'],
    ['PORT', '-1', 'must be a whole number'],
    ['WORKER_CONCURRENCY', '0', 'must be at least 1'],
    ['DATABASE_POOL_SIZE', '1', 'must be at least 2'],
    ['STOP_GRACE_MS', '1e3', 'must be a whole number of milliseconds'],
    ['STOP_GRACE_MS', '0', 'must be at least 1'],
    ['CANCEL_POLL_MS', '49', 'must be at least 50'],
    ['WATCHDOG_MS', '999', 'must be at least 1000'],
    ['LOCK_MS', '999', 'must be at least 1000'],
    ['RECONCILE_MS', '49', 'must be at least 50'],
    ['TASK_MEMORY_MB', '15', 'must be at least 16'],
    ['CANCEL_POLL_MS', '9999999999', 'must be at most 2147483647'],
    ['DRAIN_MS', '99999999999999999999999999', 'must be at most 2147483647'],
    ['LOG_LEVEL', 'loud', 'must be one of fatal, error, warn, info, debug, trace, silent'],
    ['LOG_FORMAT', 'xml', 'must be one of json, pretty'],
    ['QUEUE_PREFIX', 'a:b', 'must be 1 to 64 letters, digits or any of _ - . { }'],
    ['TASK_ENV', 'A,B C', 'must be variable names separated by commas'],
    ['SCENARIO_DOMAIN', 'https://x', 'must be a domain name'],
    ['SCENARIO_DOMAIN', '..', 'must be a domain name'],
  ])('refuse %s=%s', (name, value, rule) => {
    expect(faultsOf({ ...REQUIRED, [name]: value })).toEqual([`${name} ${rule}`]);
  });

  it('refuse a schema, which Prisma would heed and the service would not', () => {
    const DATABASE_URL = 'postgres://a:b@c/d?schema=';
    expect(faultsOf({ ...REQUIRED, DATABASE_URL: `${DATABASE_URL}other` })).toEqual([
      'DATABASE_URL must name no schema but public',
    ]);
    expect(faultsOf({ ...REQUIRED, DATABASE_URL: `${DATABASE_URL}public` })).toEqual([]);
    expect(faultsOf({ ...REQUIRED, DATABASE_URL: `${DATABASE_URL}public&options=-c%20search_path%3Dother` })).toEqual([
      'DATABASE_URL must name no schema but public',
    ]);
    expect(faultsOf({ ...REQUIRED, DATABASE_URL: 'nonsense' })).toEqual(['DATABASE_URL must be a postgres:// URL']);
  });

  it('refuse certificate files that cannot be read', () => {
    const DATABASE_URL = 'postgres://a:b@c/d?sslmode=verify-full&sslrootcert=';
    expect(faultsOf({ ...REQUIRED, DATABASE_URL: `${DATABASE_URL}/nowhere/ca.pem` })).toEqual([
      'DATABASE_URL must name files that can be read as sslcert, sslkey, sslrootcert',
    ]);
    expect(faultsOf({ ...REQUIRED, DATABASE_URL: `${DATABASE_URL}${__filename}` })).toEqual([]);
  });

  it('hold variables against each other', () => {
    expect(faultsOf({ ...REQUIRED, CANCEL_POLL_MS: '40000' })).toEqual([
      'BLIND_MS must be at least twice CANCEL_POLL_MS',
    ]);
    expect(faultsOf({ ...REQUIRED, CANCEL_POLL_MS: '30000', BLIND_MS: '60000' })).toEqual([]);
    expect(faultsOf({ ...REQUIRED, WORKER_LOST_MS: '60000' })).toEqual(['WORKER_LOST_MS must be longer than BLIND_MS']);
    expect(faultsOf({ ...REQUIRED, WATCHDOG_MS: '90000' })).toEqual(['WORKER_LOST_MS must be longer than WATCHDOG_MS']);
    expect(faultsOf({ ...REQUIRED, STOP_GRACE_MS: '2147483000' })).toEqual([
      'STOP_ACK_MS + STOP_GRACE_MS + STOP_KILL_MS must be at most 2147483647',
    ]);
  });

  it('refuse several Redis URLs for one Redis, and a cluster whose keys would be all over it', () => {
    const REDIS_URL = 'redis://a:1, redis://b:2';
    expect(faultsOf({ ...REQUIRED, REDIS_URL })).toEqual([
      'REDIS_URL must be one URL, or REDIS_MODE sentinel or cluster',
    ]);
    // Redis hashes only what the first braces hold; if that is empty, it hashes the whole key.
    for (const QUEUE_PREFIX of ['jobs', '{}{jobs}']) {
      expect(faultsOf({ ...REQUIRED, REDIS_URL, REDIS_MODE: 'cluster', QUEUE_PREFIX })).toEqual([
        'QUEUE_PREFIX must have a part in braces on a cluster',
      ]);
    }
    expect(faultsOf({ ...REQUIRED, REDIS_URL, REDIS_MODE: 'cluster', QUEUE_PREFIX: 'a:{b}' })).toHaveLength(1);
    expect(parseSettings({ ...REQUIRED, REDIS_URL, REDIS_MODE: 'cluster' }).REDIS_URL).toEqual([
      'redis://a:1',
      'redis://b:2',
    ]);
  });

  it('name every fault at once, and never a value', () => {
    const faults = faultsOf({ DATABASE_URL: 'secret', REDIS_URL: 'secret', PORT: 'secret', LOG_LEVEL: 'secret' });
    expect(faults.map((fault) => fault.split(' ')[0])).toEqual(['DATABASE_URL', 'REDIS_URL', 'PORT', 'LOG_LEVEL']);
    expect(faults.join()).not.toContain('secret');
  });

  it('split a list', () => {
    expect(parseSettings({ ...REQUIRED, TASK_ENV: 'A,B_C' }).TASK_ENV).toEqual(['A', 'B_C']);
  });
});
