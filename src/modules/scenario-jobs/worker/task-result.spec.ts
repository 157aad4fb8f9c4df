import { parseResult } from './task-result';

describe('the slug of a scenario', () => {
  it.each([
    ['Discovery Call with IT Director', 'discovery-call-with-it-director'],
    [' Crème brûlée! ', 'creme-brulee'],
    [`${'x'.repeat(79)} y`, 'x'.repeat(79)],
    ['面接', 'scenario'],
  ])('is what a URL can have of its name: %s', (name, slug) => {
    expect(parseResult(JSON.stringify({ name })).scenario?.slug).toBe(slug);
  });
});
