// Faults that the machine must find: each is put into a copy of the built service.

const jobs = 'modules/scenario-jobs/job.repository.js';
const runs = 'modules/scenario-jobs/run.repository.js';
const listener = 'modules/scenario-jobs/worker/cancel-listener.js';

/** `find` must occur exactly once in the file. */
export const MUTANTS = [
  {
    name: 'claim-without-its-condition',
    says: 'a worker begins a job whatever its status is',
    file: runs,
    find: /(WHERE j\.id = \$\{jobId\}) AND \$\{job_sql_1\.NOT_FINISHED\} AND \(j\.status = 'queued' OR [^`]*?(\s+RETURNING id, attempt)/,
    replace: '$1$2',
  },
  {
    name: 'complete-without-run-id',
    says: 'the result of a run counts although another has taken over',
    file: runs,
    find: /(SET status = 'completed'[^;]*?status = 'processing') AND run_id = \$\{runId\}::uuid/,
    replace: '$1',
  },
  {
    name: 'cancel-reads-then-writes',
    says: 'a cancel looks at the status first and then writes without looking',
    file: jobs,
    find: /(async cancel\(request\) \{)([\s\S]*?\$\{askedFor\(requests\)\})\s+WHERE \$\{job_sql_1\.NOT_FINISHED\}([\s\S]*?WHERE j\.id = asked\.id) AND \$\{job_sql_1\.NOT_FINISHED\}/,
    replace: `$1
        const [seen] = await this.database.$queryRaw\`SELECT status::text FROM scenario_jobs WHERE id = \${request.jobId}\`;
        if (!['queued', 'processing'].includes(seen?.status)) return undefined;$2$3`,
  },
  {
    name: 'worker-trusts-the-message',
    says: 'a worker stops a run because a message says so, whether or not it has the token of the run',
    file: listener,
    find: /if \(told && run && run\.stopToken === told\.stopToken\)/,
    replace: 'if (told && run)',
  },
  {
    name: 'poll-removed',
    says: 'a worker asks Postgres only when it is told to',
    file: listener,
    find: /this\.timer = setTimeout\(\(\) => this\.poll\(\), this\.settings\.CANCEL_POLL_MS\);/,
    replace: `this.timer = setInterval(() => this.workers.reportAlive(this.workerId).catch(() => undefined), 300);`,
  },
];
