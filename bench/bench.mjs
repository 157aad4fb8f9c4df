// npm run bench: measures the service against a floor, against growth and against its peers, on servers of its own.
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { prepare, root } from '../scripts/prepare.mjs';
import * as bounds from './sections/bounds.mjs';
import * as cost from './sections/cost.mjs';
import * as createGet from './sections/create-get.mjs';
import * as floor from './sections/floor.mjs';
import * as growth from './sections/growth.mjs';
import * as peers from './sections/peers.mjs';
import * as stop from './sections/stop.mjs';
import { environmentOf, writeReport } from './report.mjs';
import { Stage } from './stage.mjs';

const SECTIONS = { floor, growth, stop, bounds, peers, cost, 'create-get': createGet };
const HELP = `Usage: npm run bench -- [--quick] [--only <section>]...

Starts its own Postgres and Redis and the service, measures, and writes the results: those of a full run to
bench/RESULTS.md, bench/results.json and bench/growth.svg, those of any other run to bench/results/.

  --quick            fewer rounds and smaller sizes: about two minutes instead of ten to fifteen
  --only <section>   run only this section; may be repeated. Sections: ${Object.keys(SECTIONS).join(', ')}
  --help             this text

Exit codes: 0 measured, 1 failure or wrong answer, 2 wrong usage. A missed goal is a result, not a failure.
`;
const say = (line = '') => console.log(line);

function parse(args) {
  try {
    const { values } = parseArgs({
      args,
      options: {
        quick: { type: 'boolean', default: false },
        only: { type: 'string', multiple: true, default: [] },
        help: { type: 'boolean', short: 'h' },
      },
    });
    const known = values.only.every((name) => Object.hasOwn(SECTIONS, name));
    return known ? values : { fault: `--only needs a section: ${Object.keys(SECTIONS).join(', ')}` };
  } catch (error) {
    return { fault: error.message };
  }
}

async function main(args) {
  const { fault, help, quick, only } = parse(args);
  if (help) return void process.stdout.write(HELP);
  if (fault) {
    process.stderr.write(`${fault}\n\n${HELP}`);
    process.exitCode = 2;
    return;
  }
  await prepare(say);
  const began = new Date();
  const names = Object.keys(SECTIONS).filter((name) => only.length === 0 || only.includes(name));
  say('Starting Postgres and Redis');
  const stage = await Stage.open(say);
  let failed = true;
  try {
    const environment = await environmentOf(stage, began);
    const rounds = quick ? 3 : 7;
    const results = await measure(stage, names, { quick, rounds });
    const seconds = (Date.now() - began) / 1000;
    const mode = quick ? 'quick' : 'full';
    const folder = join(root, 'bench', quick || only.length > 0 ? 'results' : '');
    const path = writeReport(folder, { environment, mode, rounds, seconds, results, sections: SECTIONS });
    for (const name of names) say(`\n${name}\n\n${SECTIONS[name].show(results[name])}`);
    say(`Took ${Math.round(seconds)} s. Written to ${path}`);
    failed = false;
  } catch (error) {
    // A signal has stopped the run: what was under way has failed, and everything is already being ended.
    if (stage.ending.isEnding()) return 'by a signal';
    throw new Error(`${error.stack}\nThe logs are in ${stage.place}`, { cause: error });
  } finally {
    if (!stage.ending.isEnding()) await stage.close({ failed });
  }
}

async function measure(stage, names, options) {
  const load = stage.startHelper('load', 'load.mjs');
  const results = {};
  for (const name of names) {
    const began = Date.now();
    results[name] = await SECTIONS[name].measure({ stage, load, say, ...options });
    say(`${name}: done in ${Math.round((Date.now() - began) / 1000)} s`);
  }
  return results;
}

main(process.argv.slice(2)).then(
  // After a signal the process ends by that signal, once everything has been stopped.
  (stopped) => stopped ?? process.exit(),
  (error) => {
    process.stderr.write(`\n${error.message}\n`);
    process.exit(1);
  },
);
