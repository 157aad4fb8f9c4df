export default async function tearDown() {
  await globalThis.testProcesses.stop();
}
