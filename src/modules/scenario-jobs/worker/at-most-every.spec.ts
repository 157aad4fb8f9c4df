import { atMostEvery } from './at-most-every';

describe('at most every', () => {
  beforeEach(() => jest.useFakeTimers());
  afterEach(() => jest.useRealTimers());

  function open() {
    const passed: number[] = [];
    return { passed, ...atMostEvery<number>(100, (value) => passed.push(value)) };
  }

  it('passes the first on at once, and then the newest', () => {
    const { passed, take } = open();
    for (const value of [1, 2, 3]) take(value);
    expect(passed).toEqual([1]);
    jest.advanceTimersByTime(100);
    expect(passed).toEqual([1, 3]);
    take(4);
    expect(passed).toEqual([1, 3]);
    jest.advanceTimersByTime(100);
    expect(passed).toEqual([1, 3, 4]);
  });

  it('passes on at once again after a quiet time', () => {
    const { passed, take } = open();
    take(1);
    jest.advanceTimersByTime(500);
    take(2);
    expect(passed).toEqual([1, 2]);
  });

  it('passes on what still waits when it is flushed, once', () => {
    const { passed, take, flush } = open();
    for (const value of [1, 2, 3]) take(value);
    flush();
    flush();
    jest.advanceTimersByTime(500);
    expect(passed).toEqual([1, 3]);
  });
});
