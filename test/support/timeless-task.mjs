// A task whose module replaces timers, as test doubles do.
globalThis.setImmediate = () => undefined;
globalThis.setTimeout = () => undefined;

export default () => ({ name: 'Timeless scenario' });
