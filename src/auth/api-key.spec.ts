import { hashApiKey, newApiKey, parseAuthorization } from './api-key';

describe('an API key', () => {
  it('is exec_live_ and forty alphanumeric characters, never the same twice', () => {
    const keys = Array.from({ length: 100 }, newApiKey);
    expect(keys.every((key) => /^exec_live_[A-Za-z0-9]{40}$/.test(key))).toBe(true);
    expect(new Set(keys).size).toBe(100);
  });

  it('is read from a Bearer header, whose scheme may be in any case', () => {
    const key = newApiKey();
    for (const scheme of ['Bearer', 'bearer', 'BEARER']) expect(parseAuthorization(`${scheme} ${key}`)).toBe(key);
    expect(parseAuthorization(`Bearer ${key.replace('exec', 'EXEC')}`)).toBeUndefined();
    expect(parseAuthorization(undefined)).toBeUndefined();
  });

  it('is stored as its SHA-256', () => {
    expect(hashApiKey('abc')).toBe('ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad');
  });
});
