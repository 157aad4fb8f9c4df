import { OwnRedis } from './own-redis';
import { TestSystem } from './test-system';

/** A system with a Redis of its own, to be stopped after it. */
export async function startWithOwnRedis(settings: Record<string, string> = {}) {
  const redis = await OwnRedis.start();
  try {
    const system = await TestSystem.start({ redisUrl: redis.url, settings });
    return { redis, system };
  } catch (error) {
    await redis.stop();
    throw error;
  }
}
