import { isAtMost, isStorable } from '../../../infrastructure/text';
import { type NewScenario } from '../run.repository';

const MAX_NAME = 255;
const MAX_SLUG = 80;

type Parsed =
  { scenario: NewScenario; error?: undefined } | { scenario?: undefined; error: { code: string; message: string } };

/** The scenario in a task's result: an object with a `name`; whatever else it has is the scenario's content. */
export function parseResult(json: string | undefined): Parsed {
  if (json === undefined) return { error: { code: 'TASK_NO_RESULT', message: 'The task ended without a result' } };
  let storable = true;
  const check = (text: string) => (storable &&= isStorable(text));
  let result: unknown;
  try {
    result = JSON.parse(json, (key, value: unknown) => {
      check(key);
      if (typeof value === 'string') check(value);
      return value;
    });
  } catch {
    return invalid('The result of the task is not JSON, or nested too deeply');
  }
  if (typeof result !== 'object' || result === null || Array.isArray(result)) {
    return invalid('The result of the task is not an object');
  }
  const { name, ...content } = result as Record<string, unknown>;
  if (typeof name !== 'string' || name.trim() === '' || !isAtMost(name, MAX_NAME)) {
    return invalid(`The result of the task has no name of 1 to ${MAX_NAME} characters, not all of them blank`);
  }
  if (!storable) return invalid('The result of the task has text that is not valid Unicode');
  return { scenario: { name, slug: slugOf(name), content } };
}

function invalid(message: string): Parsed {
  return { error: { code: 'RESULT_INVALID', message } };
}

/** The name as the last part of a URL: "Discovery Call with IT Director" is `discovery-call-with-it-director`. */
function slugOf(name: string): string {
  const slug = name
    .normalize('NFKD')
    .toLowerCase()
    .replaceAll(/\p{Mark}/gu, '')
    .replaceAll(/[^a-z0-9]+/g, '-')
    .slice(0, MAX_SLUG)
    .replaceAll(/^-+|-+$/g, '');
  return slug || 'scenario';
}
