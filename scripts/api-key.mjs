// npm run -s api-key: the command line for API keys. If DATABASE_URL names no database, it uses that of an `npm run up`
// that runs in this folder.
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { prepare, root } from './prepare.mjs';
import { STATE } from './service.mjs';

const PROGRAM = join(root, 'dist', 'cli', 'api-key.js');
const args = process.argv.slice(2);

function databaseOfUp() {
  if (!existsSync(STATE)) return undefined;
  const { pid, databaseUrl } = JSON.parse(readFileSync(STATE, 'utf8'));
  try {
    process.kill(pid, 0);
    return databaseUrl;
  } catch {
    return undefined; // `npm run up` was killed and could not remove the file.
  }
}

const needsDatabase = !args.includes('--help') && !args.includes('-h');
const DATABASE_URL = process.env.DATABASE_URL || databaseOfUp();
if (needsDatabase && !DATABASE_URL) {
  process.stderr.write('There is no database: start `npm run up` in this folder, or set DATABASE_URL\n');
  process.exit(1);
}
try {
  // Only if there is nothing to run: a build would replace the programs of a service that runs here. Progress goes to
  // standard error, because only the key goes to standard output.
  if (!existsSync(PROGRAM)) await prepare((line) => process.stderr.write(`${line}\n`));
} catch (error) {
  process.stderr.write(`${error.message}\n`);
  process.exit(1);
}
const { status } = spawnSync(process.execPath, [PROGRAM, ...args], {
  env: { ...process.env, DATABASE_URL },
  stdio: 'inherit',
});
process.exit(status ?? 1);
