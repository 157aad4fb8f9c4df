import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { connectionsWith } from './database';

describe('a connection to Postgres whose URL names a certificate file', () => {
  const folder = mkdtempSync(join(tmpdir(), 'certificate-'));
  const file = join(folder, 'ca.pem');
  afterAll(() => rmSync(folder, { recursive: true }));

  it('has what the file holds now or, if it cannot be opened, what it held before', () => {
    writeFileSync(file, 'first');
    const Connection = connectionsWith(
      `postgres://a:b@c/d?sslmode=verify-full&sslrootcert=${file}`,
      pino({ enabled: false }),
    );
    const authority = () => (new Connection() as unknown as { ssl: { ca: string } }).ssl.ca;
    expect(authority()).toBe('first');
    writeFileSync(file, 'second');
    expect(authority()).toBe('second');
    rmSync(file);
    expect(authority()).toBe('second');
  });
});
