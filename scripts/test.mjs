// npm test: prepares a fresh clone, then runs every test. Arguments go to Jest.
import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { prepare, root } from './prepare.mjs';

await prepare((line) => console.log(line));
const jest = spawn(process.execPath, [join(root, 'node_modules/jest/bin/jest.js'), ...process.argv.slice(2)], {
  cwd: root,
  stdio: 'inherit',
});
// Ctrl-C reaches Jest as well, which then ends its servers: wait for that.
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => undefined);
jest.on('exit', (code) => process.exit(code ?? 1));
