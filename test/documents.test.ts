import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import ts from 'typescript';
import { SETTINGS } from '../src/config/settings';
import { API_ERRORS } from '../src/http/api-error';
import { Metrics } from '../src/infrastructure/metrics';
import { TRANSITIONS } from '../src/modules/scenario-jobs/job-status';

const read = (path: string) => readFileSync(join(__dirname, '..', path), 'utf8');

/** The rows of every table in a document, without the spaces around their cells. */
const rowsOf = (document: string) =>
  document
    .split('\n')
    .filter((line) => line.startsWith('|'))
    .map((line) =>
      line
        .split('|')
        .slice(1, -1)
        .map((cell) => cell.trim()),
    );

/** A sum of settings and seconds, such as `STOP_ACK_MS` + 7 s. */
const SUM = /(?:`[A-Z_]+`|\d+ s)(?: \+ (?:`[A-Z_]+`|\d+ s))*/.source;

/** The sum in milliseconds, with the settings' defaults. */
function millisecondsOf(sum: string): number {
  const terms = sum.split(' + ').map((term) => {
    const name = /^`(.*)`$/.exec(term)?.[1];
    return name === undefined ? 1000 * Number.parseInt(term) : SETTINGS[name as keyof typeof SETTINGS].parse(undefined);
  });
  return terms.reduce<number>((total, term) => total + Number(term), 0);
}

describe('the README', () => {
  const readme = read('README.md');
  const rows = rowsOf(readme);

  it('lists every setting with its default and what it is for', () => {
    const expected = Object.entries(SETTINGS).map(([name, schema]) => {
      const { success, data } = schema.safeParse(undefined);
      const initial = success ? (data === undefined ? '' : `\`${String(data)}\``) : '**required**';
      return [`\`${name}\``, initial, schema.description];
    });
    expect(rows.filter(([name]) => /^`[A-Z_]+`$/.test(name ?? ''))).toEqual(expected);
  });

  it('says how long a stop takes by the default settings', () => {
    const bounds = [...readme.matchAll(new RegExp(`\\| (\\d+) s[^|:]*: (${SUM})`, 'g'))];
    expect(bounds).toHaveLength(6);
    expect(bounds.map(([, , sum = '']) => millisecondsOf(sum) / 1000)).toEqual(
      bounds.map(([, seconds]) => Number(seconds)),
    );
  });

  it('lists every error that the API answers with', () => {
    const expected = Object.entries(API_ERRORS).map(([code, { status, type, about }]) => [
      String(status),
      `\`${type}\``,
      `\`${code}\``,
      about,
    ]);
    expect(rows.filter(([status]) => /^\d{3}$/.test(status ?? ''))).toEqual(expected);
  });

  it('lists every transition of a job', () => {
    const expected = Object.entries(TRANSITIONS).map(([from, to]) => [from, to.join(', ')]);
    const start = rows.findIndex(([from, to]) => from === 'from' && to === 'to');
    expect(rows.slice(start + 2, start + 2 + expected.length)).toEqual(expected);
  });
});

describe('.env.example', () => {
  it('has every setting, and no other, under what it is for', () => {
    const settings = read('.env.example')
      .split('\n\n')
      .flatMap((paragraph) => {
        const [, about = '', name] = /^((?:# .*\n)*)(?:# )?([A-Z][A-Z_]+)=/.exec(paragraph) ?? [];
        return name === undefined ? [] : [[name, about.replaceAll(/\n?# /g, ' ').trim()]];
      });
    expect(Object.fromEntries(settings)).toEqual(
      Object.fromEntries(
        Object.entries(SETTINGS).map(([name, { description }]) => [name, description?.replaceAll('`', '')]),
      ),
    );
  });
});

describe('the Dockerfile', () => {
  it('starts Node with the flags of package.json', () => {
    const { scripts } = JSON.parse(read('package.json')) as { scripts: Record<string, string> };
    const image = read('Dockerfile');
    const [entrypoint, command] = ['ENTRYPOINT', 'CMD'].map((instruction) => {
      const words = new RegExp(`^${instruction} (.*)$`, 'm').exec(image)?.[1] ?? '';
      return (JSON.parse(words) as string[]).join(' ');
    });
    expect(`exec ${entrypoint} dist/main.worker.js`).toBe(scripts['start:worker']);
    expect(`exec ${entrypoint} ${command}`).toBe(scripts['start:api']);
  });
});

describe('the mutants of the machine', () => {
  it('can each be put into the built service, in one place', () => {
    const script = `
      import { readFileSync } from 'node:fs';
      import { MUTANTS } from './test/machine/mutants.mjs';
      const places = ({ file, find }) => readFileSync('dist/' + file, 'utf8').match(new RegExp(find, 'g'))?.length ?? 0;
      console.log(JSON.stringify(Object.fromEntries(MUTANTS.map((mutant) => [mutant.name, places(mutant)]))));`;
    const { stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
      cwd: join(__dirname, '..'),
      encoding: 'utf8',
    });
    const places = JSON.parse(stdout) as Record<string, number>;
    expect(Object.keys(places)).toHaveLength(5);
    expect(places).toEqual(Object.fromEntries(Object.keys(places).map((name) => [name, 1])));
  });
});

describe('docs/guarantees.md', () => {
  it('says how long a stop takes by the default settings', () => {
    const bounds = [...read('docs/guarantees.md').matchAll(new RegExp(`\\| (${SUM}) \\| (\\d+) \\| (\\d+) \\|`, 'g'))];
    expect(bounds).toHaveLength(6);
    expect(bounds.map(([, sum = '']) => [millisecondsOf(sum), millisecondsOf(`${sum} + \`CANCEL_POLL_MS\``)])).toEqual(
      bounds.map(([, , told, untold]) => [Number(told), Number(untold)]),
    );
  });

  const backed = rowsOf(read('docs/guarantees.md')).filter(([, file]) => /^`(test|src)\//.test(file ?? ''));

  it.each(backed)('%s: there is such a test', (_promise, file = '', words = '') => {
    expect(titlesIn(file.replaceAll('`', ''))).toContainEqual(expect.stringContaining(words));
  });
});

/**
 * The titles of the tests in a file, each preceded by the titles around it, with the rows of its table if it has one.
 */
function titlesIn(path: string): string[] {
  const titles: string[] = [];
  const visit = (node: ts.Node, parent: string): void => {
    const [call, title] = ts.isCallExpression(node) ? [node.expression.getText(), node.arguments[0]] : [];
    // Skipped tests do not count.
    if (call && /^(x(it|test|describe)\b|(it|test|describe)\.(skip|todo)\b)/.test(call)) return;
    if (!call || !title || !/^(it|describe)(\.each\b|$)/.test(call)) {
      return void ts.forEachChild(node, (child) => visit(child, parent));
    }
    const own = `${parent} ${ts.isStringLiteralLike(title) ? title.text : title.getText()} ${call}`;
    if (call.startsWith('it')) titles.push(own);
    ts.forEachChild(node, (child) => visit(child, own));
  };
  visit(ts.createSourceFile(path, read(path), ts.ScriptTarget.Latest, true), '');
  return titles;
}

describe('package.json', () => {
  it('has no shell between npm and a program, for that would keep signals to itself', () => {
    const { scripts } = JSON.parse(read('package.json')) as { scripts: Record<string, string> };
    const programs = Object.values(scripts).filter((script) => /\bnode /.test(script));
    expect(programs.length).toBeGreaterThan(5);
    expect(programs.filter((script) => !script.startsWith('exec node '))).toEqual([]);
  });
});

describe('docs/operations.md', () => {
  it('describes every metric of ours', () => {
    const documented = rowsOf(read('docs/operations.md')).flatMap(
      ([name]) => /^`((?:scenario_jobs|http)_\w+)`$/.exec(name ?? '')?.[1] ?? [],
    );
    const metrics = new Metrics();
    metrics.showJobs(() => Promise.resolve({ queued: 0, processing: 0, stopping: 0 }));
    const ours = metrics.registry.getMetricsAsArray().map(({ name }) => name);
    expect(documented.sort()).toEqual(ours.filter((name) => /^(scenario_jobs|http)_/.test(name)).sort());
  });
});
