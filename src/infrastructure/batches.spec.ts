import { Batches } from './batches';

/** Batches whose runs end when the test says so; `begun` lists the runs in the order in which they began. */
function open(limits?: { atOnce: number; size: number }) {
  const begun: { inputs: number[]; end: (error?: Error) => void }[] = [];
  const batches = new Batches<number, string>(
    (inputs) =>
      new Promise((resolve, reject) =>
        begun.push({ inputs, end: (error) => (error ? reject(error) : resolve(inputs.map((input) => `<${input}>`))) }),
      ),
    limits,
  );
  return { batches, begun, inputs: () => begun.map((each) => each.inputs) };
}

const settled = () => new Promise((done) => setImmediate(done));

describe('batches', () => {
  it('begin at once while few are under way, and gather what comes meanwhile', async () => {
    const { batches, begun, inputs } = open({ atOnce: 2, size: 3 });
    const answers = [1, 2, 3, 4, 5, 6].map((input) => batches.call(input));
    expect(inputs()).toEqual([[1], [2]]);
    begun[0]!.end();
    await settled();
    expect(inputs()).toEqual([[1], [2], [3, 4, 5]]);
    begun[1]!.end();
    await settled();
    begun[2]!.end();
    begun[3]!.end();
    expect(await Promise.all(answers)).toEqual(['<1>', '<2>', '<3>', '<4>', '<5>', '<6>']);
  });

  it('fail together, and go on afterwards', async () => {
    const { batches, begun } = open({ atOnce: 1, size: 9 });
    const [first, ...others] = [1, 2, 3].map((input) => batches.call(input));
    begun[0]!.end();
    await expect(first).resolves.toBe('<1>');
    await settled();
    begun[1]!.end(new Error('away'));
    for (const other of others) await expect(other).rejects.toThrow('away');
    const next = batches.call(4);
    await settled();
    begun[2]!.end();
    await expect(next).resolves.toBe('<4>');
  });
});
