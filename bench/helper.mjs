// Processes that the benchmark starts beside itself and asks over IPC: the load generator, the peers, the floor of
// `stop`. A helper answers one question at a time, by its name.

/** In the helper: answers each question with what the handler of that name returns. */
export function serve(handlers) {
  process.on('message', async ({ id, name, input }) => {
    try {
      process.send({ id, output: await handlers[name](input) });
    } catch (error) {
      process.send({ id, error: error.stack });
    }
  });
  process.on('disconnect', () => process.exit(0));
}

/** In the benchmark: starts a helper. `ask` returns its answer. */
export function startHelper(processes, name, file, { program = process.execPath, args = [], env = {}, onExit } = {}) {
  const waiting = new Map();
  const child = processes.start(name, program, [...args, file], {
    stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    env: { ...process.env, ...env },
    onExit: (why) => {
      for (const { reject } of waiting.values()) reject(new Error(why));
      onExit?.(why);
    },
  });
  child.on('message', ({ id, output, error }) => {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error === undefined) resolve(output);
    else reject(new Error(`${name}: ${error}`));
  });
  let last = 0;
  const ask = (question, input) =>
    new Promise((resolve, reject) => {
      const id = ++last;
      waiting.set(id, { resolve, reject });
      child.send({ id, name: question, input });
    });
  return { ask, pid: child.pid };
}
