import js from '@eslint/js';
import prettier from 'eslint-config-prettier';
import jest from 'eslint-plugin-jest';
import { defineConfig, globalIgnores } from 'eslint/config';
import tseslint from 'typescript-eslint';

/** Forbids imports in some files, and says why. */
const fence = (files, ignores, patterns) => ({
  files,
  ignores,
  rules: { '@typescript-eslint/no-restricted-imports': ['error', { patterns }] },
});

const generated = {
  regex: 'generated/prisma',
  message: 'Only repositories and the database itself use Prisma: nobody else writes SQL or knows tables.',
};
const httpErrors = {
  group: ['@nestjs/common'],
  importNamePattern: 'Exception$',
  message: 'The domain throws its own errors; only http/ knows what they are in HTTP.',
};

export default defineConfig(
  globalIgnores(['dist', 'coverage', 'src/generated', '.local', 'bench/results']),
  js.configs.recommended,
  {
    files: ['**/*.ts'],
    extends: [tseslint.configs.recommendedTypeChecked],
    languageOptions: { parserOptions: { projectService: true } },
    rules: {
      '@typescript-eslint/no-floating-promises': 'error',
      '@typescript-eslint/switch-exhaustiveness-check': ['error', { considerDefaultExhaustiveForUnions: true }],
      '@typescript-eslint/consistent-type-imports': ['error', { fixStyle: 'inline-type-imports' }],
      'no-restricted-properties': [
        'error',
        { object: 'process', property: 'env', message: 'Settings are read once, in config/settings.ts.' },
      ],
    },
  },
  {
    // The reader of the settings; what a task inherits; programs that are not part of the service's processes.
    files: [
      'src/config/settings.ts',
      'src/modules/scenario-jobs/worker/task-process.ts',
      'src/modules/scenario-jobs/tasks/*.ts',
      'src/cli/*.ts',
      'prisma.config.ts',
      'test/**/*.ts',
    ],
    rules: { 'no-restricted-properties': 'off' },
  },
  fence(
    ['src/modules/scenario-jobs/*.ts'],
    [
      'src/modules/scenario-jobs/job.repository.ts',
      'src/modules/scenario-jobs/worker.repository.ts',
      'src/modules/scenario-jobs/job.sql.ts',
    ],
    [{ regex: '^\\./(api|worker|tasks)/', message: 'The core knows neither of its edges.' }, generated, httpErrors],
  ),
  fence(
    ['src/modules/scenario-jobs/api/**/*.ts'],
    [],
    [
      { regex: '\\.\\./worker/', message: 'The HTTP edge and the worker edge meet in the core only.' },
      generated,
      httpErrors,
    ],
  ),
  fence(
    ['src/modules/scenario-jobs/worker/**/*.ts'],
    [],
    [
      {
        regex: '\\.\\./api/|/http/|/auth/',
        message: 'The worker edge knows nothing of HTTP; they meet in the core only.',
      },
      generated,
      httpErrors,
    ],
  ),
  fence(
    ['src/auth/*.ts', 'src/http/*.ts', 'src/infrastructure/*.ts', 'src/config/*.ts', 'src/cli/*.ts'],
    ['src/infrastructure/database.ts', 'src/auth/api-key.repository.ts'],
    [generated],
  ),
  fence(
    ['src/main.task.ts', 'src/main.watchdog.ts'],
    [],
    [
      {
        regex: 'infrastructure|config|generated|nestjs|bullmq|ioredis',
        message: 'This process starts with next to nothing, and knows no secrets.',
      },
    ],
  ),
  {
    files: ['**/*.{js,mjs}'],
    languageOptions: {
      globals: Object.fromEntries(
        [
          'process',
          'module',
          'require',
          'console',
          'fetch',
          'URL',
          'Buffer',
          'setTimeout',
          'clearTimeout',
          'setInterval',
          'clearInterval',
          'performance',
          'globalThis',
          'AbortController',
          'AbortSignal',
          'SharedArrayBuffer',
          'Atomics',
        ].map((name) => [name, 'readonly']),
      ),
    },
  },
  {
    files: ['**/*.spec.ts', 'test/**/*.ts'],
    extends: [jest.configs['flat/recommended']],
    rules: {
      '@typescript-eslint/no-unsafe-assignment': 'off',
      'jest/no-disabled-tests': 'error',
      'jest/expect-expect': 'off',
      // `expect` in a branch is checked by the test's own end state.
      'jest/no-conditional-expect': 'off',
      'jest/no-standalone-expect': 'off',
    },
  },
  prettier,
);
