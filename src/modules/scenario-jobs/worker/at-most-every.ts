/**
 * Passes values on to `call`, at most one every `milliseconds`: the first at once, then the newest of those that came
 * meanwhile. `flush` passes on the value that still waits.
 */
export function atMostEvery<T>(milliseconds: number, call: (value: T) => void) {
  let waiting: { value: T } | undefined;
  let timer: NodeJS.Timeout | undefined;
  const pass = (value: T) => {
    timer = setTimeout(flush, milliseconds).unref();
    call(value);
  };
  const flush = () => {
    clearTimeout(timer);
    timer = undefined;
    const next = waiting;
    waiting = undefined;
    if (next) pass(next.value);
  };
  const take = (value: T) => {
    if (timer) waiting = { value };
    else pass(value);
  };
  return { take, flush };
}
