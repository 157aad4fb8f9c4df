// npm test: prepares a fresh clone, then runs every test. Arguments go to Jest.
import { runJest } from './jest.mjs';
import { prepare } from './prepare.mjs';

await prepare((line) => console.log(line));
const { code } = await runJest(process.argv.slice(2));
process.exit(code);
