type Call<Input, Output> = {
  input: Input;
  resolve: (output: Output) => void;
  reject: (error: unknown) => void;
};

/**
 * Natural batching: a call starts at once while few batches are under way; calls that come meanwhile wait and run
 * together. No call waits for a batch to fill, and a busy moment costs one commit instead of many.
 */
export class Batches<Input, Output> {
  private readonly waiting: Call<Input, Output>[] = [];
  private underWay = 0;

  /** `run` returns one output for each input, in the same order. If it fails, every call of the batch fails. */
  constructor(
    private readonly run: (inputs: Input[]) => Promise<Output[]>,
    private readonly limits = { atOnce: 2, size: 100 },
  ) {}

  call(input: Input): Promise<Output> {
    return new Promise((resolve, reject) => {
      this.waiting.push({ input, resolve, reject });
      this.begin();
    });
  }

  private begin(): void {
    if (this.underWay >= this.limits.atOnce || this.waiting.length === 0) return;
    this.underWay++;
    const calls = this.waiting.splice(0, this.limits.size);
    void this.settle(calls).finally(() => {
      this.underWay--;
      this.begin();
    });
  }

  private async settle(calls: Call<Input, Output>[]): Promise<void> {
    try {
      const outputs = await this.run(calls.map(({ input }) => input));
      for (const [index, { resolve }] of calls.entries()) resolve(outputs[index] as Output);
    } catch (error) {
      for (const { reject } of calls) reject(error);
    }
  }
}
