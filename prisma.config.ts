import { defineConfig } from 'prisma/config';

// `prisma generate` never runs the schema engine, yet the CLI downloads one before it starts. Naming any
// existing program spares the download, and lets the build work where it cannot be reached.
if (process.argv.includes('generate')) process.env.PRISMA_SCHEMA_ENGINE_BINARY ??= process.execPath;

export default defineConfig({
  schema: 'prisma/schema.prisma',
  migrations: { path: 'prisma/migrations' },
  // `prisma generate` needs no database; `prisma migrate` complains by itself when the URL is empty.
  datasource: { url: process.env.DATABASE_URL ?? '' },
});
