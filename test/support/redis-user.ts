import { randomBytes } from 'node:crypto';
import { Redis } from 'ioredis';

/**
 * A user of the shared Redis, for processes to which Redis is to refuse something or whose connections are to be cut.
 */
export class RedisUser {
  private constructor(
    private readonly name: string,
    /** Settings with which a process logs in as this user. */
    readonly settings: { REDIS_URL: string },
  ) {}

  /** Creates a user who may do everything except what the rules take away, such as `-publish`. */
  static async create(...rules: string[]): Promise<RedisUser> {
    const [name, password] = [randomBytes(4).toString('hex'), randomBytes(8).toString('hex')];
    await command('ACL', 'SETUSER', name, 'on', `>${password}`, '~*', '&*', '+@all', ...rules);
    const url = Object.assign(new URL(process.env.TEST_REDIS_URL!), { username: name, password });
    return new RedisUser(name, { REDIS_URL: url.href });
  }

  /** Cuts every connection of its processes, which may connect again. */
  async cut(): Promise<void> {
    await command('CLIENT', 'KILL', 'USER', this.name);
  }
}

/** Settings of an api whose doorbells are all lost. */
export async function mute() {
  const { settings } = await RedisUser.create('-publish');
  return () => settings;
}

async function command(name: string, ...args: string[]): Promise<void> {
  const redis = new Redis(process.env.TEST_REDIS_URL!);
  await redis.call(name, ...args);
  redis.disconnect();
}
