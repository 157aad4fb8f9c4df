import { OwnRedis } from './own-redis';
import { TestSystem } from './test-system';

/** Starts a system with a Redis of its own, which must be stopped after the system. */
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
