import { TcpProxy } from './tcp-proxy';
import { TestSystem } from './test-system';

/** A system of which the api, or every worker, reaches Postgres by way of a proxy, and has these settings besides. */
export async function startBehindProxy(
  who: 'api' | 'worker',
  settings: Record<string, string> = {},
  options: Parameters<typeof TestSystem.start>[0] = {},
) {
  const proxy = await TcpProxy.start(process.env.TEST_POSTGRES_URL!);
  try {
    const system = await TestSystem.start({
      ...options,
      [who]: ({ DATABASE_URL }: Record<string, string>) => ({
        DATABASE_URL: proxy.through(DATABASE_URL!),
        ...settings,
      }),
    });
    return { proxy, system };
  } catch (error) {
    await proxy.stop();
    throw error;
  }
}
