// Makes a fresh clone ready to run: installs and builds what is missing. Needs nothing but Node itself.
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, readdirSync, statSync, utimesSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = join(dirname(fileURLToPath(import.meta.url)), '..');
/** An older Node must get far enough to be told: no script imports what it lacks, such as `hash` of node:crypto. */
const LEAST_NODE = [20, 19];

/** npm writes this file when it has finished. */
const INSTALLED = join(root, 'node_modules', '.package-lock.json');
/** Written when the build has finished, so that an interrupted one is repeated. */
const BUILT = join(root, 'dist', '.built');

/** @param {(line: string) => void} say is told what is going on */
export async function prepare(say) {
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major < LEAST_NODE[0] || (major === LEAST_NODE[0] && minor < LEAST_NODE[1])) {
    throw new Error(`Node ${LEAST_NODE.join('.')} or later is needed; this is ${process.versions.node}`);
  }
  if (process.platform === 'win32') {
    throw new Error('Linux or macOS is needed: Windows has no process groups. WSL will do.');
  }
  if (!isInstalled()) run(say, 'Installing packages, which takes a minute or two', ['ci', '--no-fund', '--no-audit']);
  if (!existsSync(BUILT) || newestSource() > statSync(BUILT).mtimeMs) {
    const began = new Date();
    run(say, 'Building', ['run', 'build']);
    writeFileSync(BUILT, '');
    // A change made during the build may be missing from it.
    utimesSync(BUILT, began, began);
  }
}

function run(say, what, args) {
  say(`${what} …`);
  const began = Date.now();
  const { status, error, stdout, stderr } = spawnSync('npm', args, {
    cwd: root,
    encoding: 'utf8',
    // To standard error: standard output belongs to the script.
    stdio: process.env.CI || process.env.npm_config_loglevel === 'verbose' ? ['ignore', 2, 2] : 'pipe',
    maxBuffer: 64 * 1024 * 1024,
  });
  if (status !== 0) throw new Error(`npm ${args[0]} failed\n${error ?? ''}${stdout ?? ''}${stderr ?? ''}`);
  say(`  done in ${Math.round((Date.now() - began) / 1000)} s`);
}

/** Whether every package of the lockfile is installed, except optional ones, which may be for other platforms. */
function isInstalled() {
  if (!existsSync(INSTALLED)) return false;
  const packagesOf = (file) => JSON.parse(readFileSync(file, 'utf8')).packages;
  const installed = packagesOf(INSTALLED);
  return Object.entries(packagesOf(join(root, 'package-lock.json'))).every(
    ([path, { version, optional }]) => path === '' || optional || installed[path]?.version === version,
  );
}

function newestSource() {
  const files = ['package.json', 'package-lock.json', 'tsconfig.json', 'tsconfig.build.json', 'prisma/schema.prisma'];
  const folders = [join(root, 'src')];
  const times = files.map((file) => statSync(join(root, file)).mtimeMs);
  for (let folder = folders.pop(); folder !== undefined; folder = folders.pop()) {
    for (const entry of readdirSync(folder, { withFileTypes: true })) {
      const path = join(folder, entry.name);
      if (!entry.isDirectory()) times.push(statSync(path).mtimeMs);
      else if (entry.name !== 'generated') folders.push(path);
    }
  }
  return Math.max(...times);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  prepare(console.log).catch((error) => {
    process.stderr.write(`\n${error.message}\n`);
    process.exit(1);
  });
}
