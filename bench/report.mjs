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

- Absolute figures say little: they are of one machine, which others may have been using. What counts is a **ratio**
  of two things measured in the same run, in turns.
- A figure or a ratio is the median over the rounds, with the least and the greatest round in parentheses. Every second round
  goes in the opposite order.
- Only a p99 is that of the requests of all rounds together, and so is a ratio of two: a single round has half a dozen
  beyond it, and whatever else the machine did in that second decides which.
- The servers are real: Postgres with \`fsync\` and \`synchronous_commit\`, Redis with its append-only file. The service is
  the built one, with guard, validation, log and metrics. The load generator is a process of its own.
- After each measurement every answer must have been the expected one, every row must be \`cancelled\`, and no entry may
  be left in the queue. Otherwise there are no results.
- A goal that is missed says so.
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
    `- ${date}, commit ${commit}, ${mode} run of ${Math.round(seconds)} s, ${rounds} rounds unless it says otherwise`,
    `- ${machine.cores} cores (${machine.cpu}), ${machine.memoryGb} GB, ${machine.system}`,
    `- Node ${node}, Postgres ${postgres.version} (fsync ${postgres.fsync}, synchronous_commit ` +
      `${postgres.synchronous_commit}), Redis ${redis.version} (appendfsync ${redis.appendfsync})`,
    `- ${versions.join(', ')}\n`,
  ].join('\n');
}
