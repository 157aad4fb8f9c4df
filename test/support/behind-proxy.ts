import { TcpProxy } from './tcp-proxy';
import { TestSystem } from './test-system';

/** Starts a system in which the api, or every worker, reaches Postgres through a proxy and also has these settings. */
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

/** The same for as long as `work` runs. */
export async function whileBehindProxy(
  who: 'api' | 'worker',
  settings: Record<string, string>,
  options: Parameters<typeof TestSystem.start>[0],
  work: (started: { proxy: TcpProxy; system: TestSystem }) => Promise<void>,
): Promise<void> {
  const { proxy, system } = await startBehindProxy(who, settings, options);
  try {
    await work({ proxy, system });
  } finally {
    await system.stop();
    await proxy.stop();
  }
}
