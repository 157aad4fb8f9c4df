// npm run -s api-key: the command line for API keys, on the database of a running `npm run up` of this folder
// when DATABASE_URL names no other.
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
    return undefined; // It was killed and could not remove the file.
  }
}

const needsDatabase = !args.includes('--help') && !args.includes('-h');
const DATABASE_URL = process.env.DATABASE_URL || databaseOfUp();
if (needsDatabase && !DATABASE_URL) {
  process.stderr.write('There is no database: start `npm run up` in this folder, or set DATABASE_URL\n');
  process.exit(1);
}
try {
  // Only when there is nothing to run: a build would pull the programs away from a service that runs here. And
  // only the key goes to standard output.
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
