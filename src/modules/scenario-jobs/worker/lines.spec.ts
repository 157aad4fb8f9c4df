import { PassThrough } from 'node:stream';
import { readLines } from './lines';

describe('reading lines', () => {
  const read = (chunks: string[], most: number, wanted = Infinity) => {
    const source = new PassThrough();
    const lines: string[] = [];
    readLines(source, most, (line) => {
      lines.push(line);
      return lines.length < wanted ? undefined : false;
    });
    for (const chunk of chunks) source.write(chunk);
    source.end();
    return new Promise<string[]>((resolve) => source.once('close', () => resolve(lines)));
  };

  it('puts together what comes in pieces, and cuts what is too long', async () => {
    expect(await read(['on', 'e\ntwo\nabcd', 'efg\n', '\nlast'], 5)).toEqual(['one', 'two', 'abcde', '', 'last']);
  });

  it('looks for no line once none is wanted, and reads on', async () => {
    expect(await read(['1\n2\n3\n4\n', '5\n', '6'], 5, 2)).toEqual(['1', '2']);
  });
});
