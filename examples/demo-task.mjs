// The task of `npm run up` and `npm run demo`: the built-in one, but for prompts that begin with a word in
// brackets. Those show what a cancel has to cope with.
import generateScenario from '../dist/modules/scenario-jobs/tasks/generate-scenario.js';

export default async function demoTask(input, tools) {
  console.log('the task begins'); // What a task prints is in its worker's log.
  if (input.prompt.startsWith('[spin]')) for (;;); // Computes without ever yielding: no message reaches it.
  if (input.prompt.startsWith('[stubborn]')) {
    process.on('SIGTERM', () => console.log('not now'));
    await new Promise((resolve) => setTimeout(resolve, 2 ** 30)); // Ignores the signal as well.
  }
  return generateScenario.default(input, tools);
}
