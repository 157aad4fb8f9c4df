// A task that does what the test tells it, over the socket that MACHINE_SOCKET names. It first says who it is; then
// each line that it receives is an order.
import { connect } from 'node:net';
import { createInterface } from 'node:readline';

export default async function puppet(input, { signal }) {
  const socket = connect(process.env.MACHINE_SOCKET);
  socket.on('error', () => undefined);
  socket.write(`${JSON.stringify({ jobId: input.job_id, pid: process.pid })}\n`);
  const ended = new Promise((resolve, reject) => {
    const orders = {
      complete: () => resolve({ name: 'Puppet', pid: process.pid }),
      fail: () => reject(new Error('told to fail')),
      retry: () => reject(Object.assign(new Error('told to try again'), { retryable: true })),
      deafen: () => signal.removeEventListener('abort', onAbort),
      resist: () => process.on('SIGTERM', () => undefined),
      spin: () => {
        for (;;);
      },
    };
    const onAbort = () => reject(signal.reason);
    signal.addEventListener('abort', onAbort);
    createInterface({ input: socket }).on('line', (order) => orders[order]());
  });
  try {
    return await ended;
  } finally {
    socket.destroy();
  }
}
