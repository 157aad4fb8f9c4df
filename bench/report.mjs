// Writes the measurements: RESULTS.md for people, results.json for programs, growth.svg.
import { execFileSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { arch, cpus, platform, release, totalmem } from 'node:os';
import { join } from 'node:path';
import { root } from '../scripts/prepare.mjs';
import { plotGrowth } from './plot.mjs';
import { goalsIn, isMet } from './text.mjs';

const require = createRequire(import.meta.url);
const PACKAGES = ['bullmq', 'ioredis', 'pg', '@prisma/client', '@nestjs/core', 'fastify'];

const INTRODUCTION = `# Benchmarks

Written by \`npm run bench\`. How to read it:

- Absolute figures mean little: they come from one machine, which may have had other work to do. What counts is the **ratio**
  between two things measured in turns in the same run.
- A figure or a ratio is the median over the rounds, with the lowest and the highest round in parentheses. Every second round
  takes the sides in the opposite order.
- The exception is p99, which is taken over the requests of all rounds together, as are ratios between two p99s. In a single
  round only half a dozen requests lie beyond it, and which they are depends on what else the machine did in that second.
- The servers are real: Postgres with \`fsync\` and \`synchronous_commit\`, Redis with its append-only file. The service is
  the production build, with guard, validation, log and metrics. The load generator is a separate process.
- The benchmark checks what it measures: every answer must be the expected one; after cancels every row must be
  \`cancelled\` and no entry left in the queue. If not, there are no results.
- A missed goal is marked as missed.
`;

export async function environmentOf(stage, began) {
  const { default: pg } = await import('pg');
  const { Redis } = await import('ioredis');
  const client = new pg.Client({ connectionString: stage.postgresUrl });
  await client.connect();
  const setting = async (name) => (await client.query(`SHOW ${name}`)).rows[0][name];
  const postgres = {
    version: await setting('server_version'),
    fsync: await setting('fsync'),
    synchronous_commit: await setting('synchronous_commit'),
  };
  await client.end();
  const redis = new Redis(stage.redisUrl);
  const redisVersion = /redis_version:(\S+)/.exec(await redis.info('server'))[1];
  const appendfsync = (await redis.config('GET', 'appendfsync'))[1];
  redis.disconnect();
  return {
    date: began.toISOString(),
    commit: commit(),
    machine: {
      cpu: cpus()[0].model.trim(),
      cores: cpus().length,
      memoryGb: Math.round(totalmem() / 2 ** 30),
      system: `${platform()} ${release().split('-')[0]} ${arch()}`,
    },
    node: process.versions.node,
    postgres,
    redis: { version: redisVersion, appendfsync },
    packages: Object.fromEntries(
      PACKAGES.map((name) => [name, require(`../node_modules/${name}/package.json`).version]),
    ),
  };
}

function commit() {
  try {
    const git = (...args) => execFileSync('git', args, { cwd: root, encoding: 'utf8' }).trim();
    return (
      git('rev-parse', '--short', 'HEAD') + (git('status', '--porcelain', '--', 'src', 'bench') ? ', changed' : '')
    );
  } catch {
    return 'unknown';
  }
}

/** Writes the report; returns the paths of what it wrote. */
export function writeReport(folder, { environment, mode, rounds, seconds, results, sections }) {
  mkdirSync(folder, { recursive: true });
  const goals = goalsIn(results);
  const missed = goals.filter((goal) => !isMet(goal)).length;
  const text = [
    INTRODUCTION,
    `${goals.length - missed} of ${goals.length} goals are met.\n`,
    describe(environment, { mode, rounds, seconds }),
    ...Object.entries(results).map(
      ([name, result]) => `## ${name}\n\n${sections[name].about.trim()}\n\n${sections[name].show(result)}`,
    ),
  ].join('\n');
  writeFileSync(join(folder, 'RESULTS.md'), text.trimEnd() + '\n');
  writeFileSync(
    join(folder, 'results.json'),
    `${JSON.stringify({ environment, mode, rounds, seconds, results }, null, 2)}\n`,
  );
  if (results.growth) writeFileSync(join(folder, 'growth.svg'), plotGrowth(results.growth));
  return join(folder, 'RESULTS.md');
}

function describe({ date, commit, machine, node, postgres, redis, packages }, { mode, rounds, seconds }) {
  const versions = Object.entries(packages).map(([name, version]) => `${name} ${version}`);
  return [
    `- ${date}, commit ${commit}, ${mode} run of ${Math.round(seconds)} s, ${rounds} rounds unless stated otherwise`,
    `- ${machine.cores} cores (${machine.cpu}), ${machine.memoryGb} GB, ${machine.system}`,
    `- Node ${node}, Postgres ${postgres.version} (fsync ${postgres.fsync}, synchronous_commit ` +
      `${postgres.synchronous_commit}), Redis ${redis.version} (appendfsync ${redis.appendfsync})`,
    `- ${versions.join(', ')}\n`,
  ].join('\n');
}
