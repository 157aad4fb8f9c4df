import { setTimeout as sleep } from 'node:timers/promises';
import { truncate } from '../../../infrastructure/text';

type Input = { prompt: string; context: string | null; user_email: string };
type Tools = { signal: AbortSignal; progress: (value: { step: string; done: number; of: number }) => void };

/** A scenario; each step of the task makes one part. */
type Scenario = { name: string; persona: string; objectives: string[]; opening_line: string; rubric: string[] };

const ROLES = ['IT Director', 'Head of Operations', 'Finance Lead', 'Customer Success Manager', 'Procurement Manager'];
const MOODS = ['curious but short of time', 'sceptical and well informed', 'friendly, and easily distracted'];
const CRITERIA = [
  'Asks open questions',
  'Listens and sums up',
  'Handles objections with facts',
  'Agrees on a next step',
];

/**
 * The built-in task: composes a practice scenario from prompt and context, in visible steps, without any network. The
 * same input gives the same scenario. Can be stopped between and within its steps.
 */
export default async function generateScenario(input: Input, { signal, progress }: Tools): Promise<Scenario> {
  const stepMs = Number(process.env.SCENARIO_TASK_STEP_MS || 1000);
  const seed = hash(`${input.prompt}\n${input.context ?? ''}`);
  const topic = topicOf(input.prompt);
  const role = pick(ROLES, seed);
  const steps: [string, () => Partial<Scenario>][] = [
    ['name', () => ({ name: `${topic} with ${role}` })],
    ['persona', () => ({ persona: `${role}, ${pick(MOODS, seed >>> 3)}` })],
    ['objectives', () => ({ objectives: [`Understand what ${role} needs`, ...sentencesOf(input.context)] })],
    ['opening_line', () => ({ opening_line: `Thanks for making time. So, ${lowerFirst(topic)}: where do we begin?` })],
    ['rubric', () => ({ rubric: CRITERIA.slice(0, 3 + (seed % 2)) })],
  ];
  const scenario: Partial<Scenario> = {};
  for (const [index, [step, compose]] of steps.entries()) {
    progress({ step, done: index, of: steps.length });
    await sleep(stepMs, undefined, { signal });
    Object.assign(scenario, compose());
  }
  return scenario as Scenario;
}

/** The beginning of the prompt, as a title of at most eight words. */
function topicOf(prompt: string): string {
  const words = prompt
    .trim()
    .split(/\s+/)
    .slice(0, 8)
    .join(' ')
    .replaceAll(/[.,;:!?]+$/g, '');
  const topic = truncate(words, 100);
  return topic === '' ? 'Practice call' : topic.charAt(0).toUpperCase() + topic.slice(1);
}

function sentencesOf(text: string | null): string[] {
  return (text ?? '')
    .split(/[.\n]+/)
    .map((sentence) => sentence.trim())
    .filter((sentence) => sentence !== '')
    .slice(0, 3)
    .map((sentence) => `Bring up: ${truncate(sentence, 200)}`);
}

function lowerFirst(text: string): string {
  return text.charAt(0).toLowerCase() + text.slice(1);
}

function pick<T>(choices: readonly T[], seed: number): T {
  return choices[seed % choices.length] as T;
}

/** FNV-1a. */
function hash(text: string): number {
  let value = 0x811c9dc5;
  for (let index = 0; index < text.length; index++) value = Math.imul(value ^ text.charCodeAt(index), 0x01000193);
  return value >>> 0;
}
