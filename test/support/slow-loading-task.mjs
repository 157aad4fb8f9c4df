// A task module that is still loading when its job is cancelled: it loads until it hears the request to stop.
import { writeSync } from 'node:fs';

writeSync(1, `loading ${process.pid}\n`);
await new Promise((resolve) => process.on('message', resolve));

export default function task() {
  writeSync(1, 'called\n');
  for (;;);
}
