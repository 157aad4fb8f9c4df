import { readFileSync } from 'node:fs';
import { join } from 'node:path';
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
  it('has every setting, and no other', () => {
    const names = read('.env.example')
      .split('\n')
      .flatMap((line) => /^#? ?([A-Z][A-Z_]+)=/.exec(line)?.[1] ?? []);
    expect(names.sort()).toEqual(Object.keys(SETTINGS).sort());
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
    expect(`${entrypoint} dist/main.worker.js`).toBe(scripts['start:worker']);
    expect(`${entrypoint} ${command}`).toBe(scripts['start:api']);
  });
});

describe('docs/guarantees.md', () => {
  const backed = rowsOf(read('docs/guarantees.md')).filter(([, file]) => /^`(test|src)\//.test(file ?? ''));

  it.each(backed)('%s: there is such a test', (_promise, file = '', words = '') => {
    // A title may continue on the next line of its file.
    expect(read(file.replaceAll('`', '')).replaceAll(/\s+/g, ' ')).toContain(words);
  });
});

describe('docs/operations.md', () => {
  it('describes every metric of ours', () => {
    const documented = rowsOf(read('docs/operations.md')).flatMap(
      ([name]) => /^`((?:scenario_jobs|http)_\w+)`$/.exec(name ?? '')?.[1] ?? [],
    );
    const ours = new Metrics().registry.getMetricsAsArray().map(({ name }) => name);
    expect(documented.sort()).toEqual(ours.filter((name) => /^(scenario_jobs|http)_/.test(name)).sort());
  });
});
