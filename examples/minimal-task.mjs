// The smallest useful task: waits for something, stops when it is asked to, returns a scenario.
// Run it with SCENARIO_TASK=examples/minimal-task.mjs npm run up
import { setTimeout as sleep } from 'node:timers/promises';

export default async function minimalTask({ prompt }, { signal, progress }) {
  progress({ step: 'thinking' });
  await sleep(2000, undefined, { signal }); // Throws at once when the job is cancelled, as fetch does with a signal.
  return { name: [...prompt.trim()].slice(0, 80).join('') || 'Scenario', persona: 'Ada' };
}
