// npm run machine: runs many rounds of the property-based machine, or checks that it finds known faults.
import { cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { MUTANTS } from '../test/machine/mutants.mjs';
import { runJest } from './jest.mjs';
import { prepare, root } from './prepare.mjs';

const HELP = `Usage: npm run machine -- [--runs N] [--seed N] [--mutants | --mutant NAME]

Drives real api and worker processes through random orders of creates, claims, results, cancels, lost and forged
messages, dead and frozen workers, second deliveries and wiped Redis, and checks after each step that no promise is
broken. A failure prints the steps and the seed.

  --runs N       number of rounds; by default 500, which take about ten minutes
  --seed N       repeat the rounds of an earlier run
  --mutants      put each known fault into a copy of the service, and expect the machine to find it
  --mutant NAME  only this one: ${MUTANTS.map(({ name }) => name).join(', ')}

Exit codes: 0 as promised, 1 not as promised, 2 wrong usage.
`;

async function main() {
  const { values } = parseArgs({
    options: {
      runs: { type: 'string', default: '500' },
      seed: { type: 'string' },
      mutant: { type: 'string' },
      mutants: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  });
  if (values.help) return void process.stdout.write(HELP);
  for (const name of ['runs', 'seed']) {
    const value = values[name];
    if (value !== undefined && !/^[1-9]\d{0,9}$/.test(value)) throw new Usage(`--${name} must be a positive number`);
  }
  if (values.mutant && !MUTANTS.some(({ name }) => name === values.mutant)) throw new Usage('--mutant: no such mutant');
  await prepare((line) => console.log(line));
  const rounds = { MACHINE_RUNS: values.runs, ...(values.seed && { MACHINE_SEED: values.seed }) };
  if (!values.mutants && !values.mutant) return void (process.exitCode = (await runMachine(rounds)).code);
  for (const mutant of MUTANTS) {
    if (values.mutant && values.mutant !== mutant.name) continue;
    if (!(await findMutant(mutant, rounds))) process.exitCode = 1;
  }
}

async function findMutant({ name, says, ...fault }, rounds) {
  const folder = join(root, '.local', 'mutants', name);
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  cpSync(join(root, 'dist'), join(folder, 'dist'), { recursive: true });
  mutate(join(folder, 'dist', fault.file), fault);
  console.log(`\n${name}: ${says}`);
  const { code, output } = await runMachine({ ...rounds, SERVICE_DIST: join(folder, 'dist') }, { quiet: true });
  rmSync(folder, { recursive: true, force: true });
  const found = /^round (\d+): [\s\S]*?\n\n/m.exec(output);
  if (code === 0 || !found) {
    console.log(`  NOT FOUND\n${code === 0 ? '' : output}`);
    return false;
  }
  console.log(`  found in ${found[0].trim().replaceAll('\n', '\n  ')}`);
  return true;
}

function mutate(file, { find, replace }) {
  const source = readFileSync(file, 'utf8');
  const mutated = source.replace(find, replace);
  if (mutated === source) throw new Error(`${file} has nothing like ${find}`);
  writeFileSync(file, mutated);
}

const runMachine = (environment, { quiet } = {}) => runJest(['test/machine'], { environment, quiet });

class Usage extends Error {}

main().catch((error) => {
  const usage = error instanceof Usage || error.code?.startsWith('ERR_PARSE_ARGS');
  process.stderr.write(usage ? `${error.message}\n\n${HELP}` : `${error.message}\n`);
  process.exitCode = usage ? 2 : 1;
});
