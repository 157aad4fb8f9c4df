import { randomBytes } from 'node:crypto';
import { Redis } from 'ioredis';

/** Settings of an api of which every doorbell is lost: it has a Redis user who may do everything but publish. */
export async function mute() {
  const url = new URL(process.env.TEST_REDIS_URL as string);
  const redis = new Redis(url.href);
  const [name, password] = [randomBytes(4).toString('hex'), randomBytes(8).toString('hex')];
  await redis.call('ACL', 'SETUSER', name, 'on', `>${password}`, '~*', '&*', '+@all', '-publish');
  redis.disconnect();
  Object.assign(url, { username: name, password });
  return () => ({ REDIS_URL: url.href });
}
