// Loaded into the api by profile.mjs: SIGUSR2 begins a profile of the processor, a second SIGUSR2 ends and writes it.
// (Node's --cpu-prof would include the start, and writes nothing when a process ends by a signal, as the api does.)
import { renameSync, writeFileSync } from 'node:fs';
import { Session } from 'node:inspector';

const session = new Session();
session.connect();
session.post('Profiler.enable');
session.post('Profiler.setSamplingInterval', { interval: 200 });
let running = false;

process.on('SIGUSR2', () => {
  if (!running) session.post('Profiler.start');
  else session.post('Profiler.stop', (_, { profile }) => write(process.env.PROFILE_FILE, profile));
  running = !running;
});

function write(file, profile) {
  writeFileSync(`${file}.part`, JSON.stringify(profile));
  renameSync(`${file}.part`, file);
}
