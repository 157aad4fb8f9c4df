import { randomUUID } from 'node:crypto';
import { whileBehindProxy } from '../support/behind-proxy';
import { eventually } from '../support/eventually';
import { clockAheadBy } from '../support/node-options';
import { mute, RedisUser } from '../support/redis-user';
import { groupIsAlive, NO_POLL, TestSystem } from '../support/test-system';

const UNDELIVERED = 'cancel could not be delivered, and will be noticed later';

const stoppingOf = (system: TestSystem, jobId: string) =>
  system.workers[0]!.untilLogged('stopping: the job was cancelled', jobId);

describe('a worker learns of a cancel', () => {
  let system: TestSystem;
  beforeAll(async () => {
    system = await TestSystem.start({ settings: { ...NO_POLL, WORKER_CONCURRENCY: '1' } });
  });
  afterAll(() => system.stop());

  it('by the doorbell alone', async () => {
    const { job } = await system.createRunning('cooperative');
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.untilStopped(job.id);
    expect((await stoppingOf(system, job.id)).source).toBe('doorbell');
  });

  it('and believes no message that neither has the token of the run nor is confirmed by the row', async () => {
    const { job, finish } = await system.createPatient();
    const row = await system.row(job.id);
    const channel = `${system.settings.QUEUE_PREFIX}:cancel:${row.worker_id}`;
    const forged = { runId: row.run_id, cancelledAt: Date.now() };
    const tokens = [undefined, null, randomUUID(), row.run_id];
    const messages = tokens.map((stopToken) => JSON.stringify({ ...forged, stopToken }));
    for (const message of [...messages, '{"runId":{}}', 'null', '[]', 'not JSON', '']) {
      expect(await system.redis.publish(channel, message)).toBe(1);
    }
    await finish();
    expect((await system.untilStatus(job.id, 'completed', 'failed', 'cancelled')).status).toBe('completed');
    expect((await system.row(job.id)).attempt).toBe(1);
  });

  it('on whichever worker runs the job', async () => {
    await Promise.all([system.startWorker(), system.startWorker()]);
    const jobs = await Promise.all([1, 2, 3].map(() => system.createRunning('cooperative')));
    const workers = await Promise.all(jobs.map(async ({ job }) => (await system.row(job.id)).worker_id));
    expect(new Set(workers).size).toBe(3);
    for (const { job } of jobs) await system.cancel(job.id);
    for (const { job } of jobs) expect((await system.untilStopped(job.id)).stopped_how).toBe('graceful');
  });
});

describe('a worker learns of a cancel whose message is lost', () => {
  let system: TestSystem;
  afterEach(() => system.stop());

  it('by the poll alone, when the message is lost', async () => {
    system = await TestSystem.start({ api: await mute() });
    const { job } = await system.createRunning('cooperative');
    const began = performance.now();
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.api.untilLogged(UNDELIVERED, job.id);
    expect(await system.api.metrics()).toMatch(/^scenario_jobs_doorbells_total\{outcome="failed"\} 1$/m);
    await system.untilStopped(job.id);
    expect((await stoppingOf(system, job.id)).source).toBe('poll');
    // The metric holds this one cancel, in seconds.
    const seconds = await system.workers[0]!.observed('scenario_jobs_cancel_signal_seconds');
    expect(seconds).toBeLessThan((performance.now() - began) / 1000);
  });

  it('by the next one, although a run of its own that is lost cannot be repaired, for its row is locked', async () => {
    system = await TestSystem.start({ settings: { ...NO_POLL, WORKER_CONCURRENCY: '1' }, api: await mute() });
    const { job } = await system.createRunning('cooperative');
    const { worker_id: worker } = await system.row(job.id);
    const ring = () => system.redis.publish(`${system.settings.QUEUE_PREFIX}:cancel:${worker}`, '');
    // The worker takes this job next: nobody is handed the lost job's entry.
    const next = await system.create('cooperative');
    const lost = await system.create('quick');
    await system.pool.query(
      `UPDATE scenario_jobs SET status = 'processing', run_id = gen_random_uuid(), worker_id = $1, attempt = 1, started_at = now()
       WHERE id = $2`,
      [worker, lost.id],
    );
    await system.lockRow(lost.id, async () => {
      await ring();
      expect((await system.cancel(job.id)).status).toBe(200);
      await ring();
      await system.untilStopped(job.id);
      await system.workers[0]!.untilLogged('could not repair a run that this worker does not run', lost.id);
    });
    // When the worker asks again, the lost job is repaired and runs again.
    await ring();
    await system.untilStatus(lost.id, 'queued');
    await system.cancel(next.id);
    await ring();
    await system.untilStatus(lost.id, 'completed');
  });

  it('by the poll, although statements that wait for locked rows have every connection of its pool', async () => {
    const settings = { WORKER_CONCURRENCY: '6', DATABASE_POOL_SIZE: '2' };
    system = await TestSystem.start({ settings, api: await mute() });
    const { job } = await system.createRunning('cooperative');
    // The queue learns of these jobs little by little.
    await system.lockRow(await system.insertQueued(8), async () => {
      await eventually('claims wait for the rows', async () => {
        const { rows } = await system.pool.query(
          `SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`,
        );
        return rows.length >= 2;
      });
      expect((await system.cancel(job.id)).status).toBe(200);
      expect((await stoppingOf(system, job.id)).source).toBe('poll');
    });
    expect(system.workers[0]!.logged('could not ask which runs were cancelled')).toBeFalsy();
  });

  it('by subscribing again alone', async () => {
    const user = await RedisUser.create();
    system = await TestSystem.start({ settings: NO_POLL, api: await mute(), worker: () => user.settings });
    const { job } = await system.createRunning('cooperative');
    expect((await system.cancel(job.id)).status).toBe(200);
    await system.api.untilLogged(UNDELIVERED, job.id);
    expect(await system.row(job.id)).toMatchObject({ status: 'cancelled', stopped_at: null });
    await user.cut();
    await system.untilStopped(job.id);
    expect((await stoppingOf(system, job.id)).source).toBe('resubscribe');
  });

  it('too late to stop it: then the result is refused, and counted', async () => {
    system = await TestSystem.start({ settings: NO_POLL, api: await mute() });
    const { job, finish } = await system.createPatient();
    expect((await system.cancel(job.id)).status).toBe(200);
    await finish();
    expect(await system.untilStopped(job.id)).toMatchObject({ status: 'cancelled', stopped_how: 'graceful' });
    expect(await system.scenarioCount(job.id)).toBe(0);
    const metrics = await system.workers[0]!.metrics();
    expect(metrics).toMatch(/scenario_jobs_late_results_refused_total 1/);
  });
});

describe('a worker whose clock is an hour behind', () => {
  it('has learned of no cancel before it happened, by its metrics', async () => {
    const NODE_OPTIONS = clockAheadBy(-3_600_000);
    const system = await TestSystem.start({ settings: NO_POLL, worker: () => ({ NODE_OPTIONS }) });
    const { job } = await system.createRunning('cooperative');
    await system.cancel(job.id);
    await system.untilStopped(job.id);
    expect((await stoppingOf(system, job.id)).source).toBe('doorbell');
    expect(await system.workers[0]!.observed('scenario_jobs_cancel_signal_seconds')).toBe(0);
    await system.stop();
  });
});

describe('a worker that is sent messages', () => {
  let system: TestSystem;
  afterEach(() => system.stop());

  it('reads no message that is longer than any of ours', async () => {
    system = await TestSystem.start({ settings: { ...NO_POLL, WATCHDOG_MS: '2000' } });
    const { job } = await system.createRunning('cooperative');
    const channel = `${system.settings.QUEUE_PREFIX}:cancel:${(await system.row(job.id)).worker_id}`;
    // If it were parsed as JSON, it would keep the worker busy for longer than its watchdog waits.
    const message = `[${Array(10_000_000).fill('[]').join()}]`;
    expect(await system.redis.publish(channel, message)).toBe(1);
    expect((await system.cancel(job.id)).status).toBe(200);
    expect(await system.untilStopped(job.id)).toMatchObject({ attempt: 1, stopped_how: 'graceful' });
  });

  it('says the token of its run to nobody', async () => {
    system = await TestSystem.start({ settings: { LOG_LEVEL: 'trace' } });
    const { id } = await system.create('environment');
    await system.untilStatus(id, 'completed');
    const { job } = await system.createRunning('cooperative');
    await system.cancel(job.id);
    await system.untilStopped(job.id);
    const { rows } = await system.pool.query<{ stop_token: string; environment: string | null }>(
      'SELECT stop_token, content::text AS environment FROM scenario_jobs j LEFT JOIN scenarios s ON s.job_id = j.id',
    );
    const said = JSON.stringify([system.api.logs, system.workers[0]!.logs, rows.map(({ environment }) => environment)]);
    expect(said).toContain((await system.row(job.id)).run_id);
    for (const { stop_token: token } of rows) {
      expect(token).toMatch(/^[0-9a-f-]{36}$/);
      expect(said).not.toContain(token);
    }
  });
});

describe('a worker that cannot ask Postgres', () => {
  let system: TestSystem;
  afterEach(() => system.stop());

  it('stops its tasks after BLIND_MS', async () => {
    system = await TestSystem.start({ settings: { BLIND_MS: '1000' } });
    const { pid, job } = await system.createRunning('cooperative');
    const { run_id: runId } = await system.row(job.id);
    await system.cutPostgres(async () => {
      await eventually('the task is gone', async () => !(await groupIsAlive(pid)));
    });
    // The job was not cancelled, so it runs again when Postgres is back.
    await eventually('the job runs again', async () => {
      const { run_id: again, status } = await system.row(job.id);
      return status === 'processing' && again !== runId;
    });
    await system.cancel(job.id);
    await system.untilStopped(job.id);
  });
});

describe('a worker that can ask Postgres and cannot give its sign of life', () => {
  it('stops its tasks after BLIND_MS, however often its doorbell rings', async () => {
    const system = await TestSystem.start({ settings: { BLIND_MS: '1000' } });
    const { job } = await system.createRunning('cooperative');
    const channel = `${system.settings.QUEUE_PREFIX}:cancel:${(await system.row(job.id)).worker_id}`;
    await system.pool.query(`
      CREATE FUNCTION is_standby() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'cannot execute INSERT' USING ERRCODE = 'read_only_sql_transaction'; END $$`);
    await system.pool.query('CREATE TRIGGER standby BEFORE INSERT OR UPDATE ON workers EXECUTE FUNCTION is_standby()');
    const ringing = setInterval(() => void system.redis.publish(channel, ''), 20);
    try {
      expect(await system.workers[0]!.untilLogged('run ended', job.id)).toMatchObject({ outcome: 'interrupted' });
    } finally {
      clearInterval(ringing);
      await system.stop();
    }
  });
});

describe('a worker that is handed a job which another one runs', () => {
  it('begins nothing, and is handed it again after two seconds', async () => {
    const system = await TestSystem.start({ workers: 0 });
    try {
      const { id } = await system.create('quick');
      await system.pool.query("INSERT INTO workers (id) VALUES ('another')");
      await system.pool.query(
        `UPDATE scenario_jobs SET status = 'processing', run_id = gen_random_uuid(), worker_id = 'another', attempt = 1, started_at = now()
         WHERE id = $1`,
        [id],
      );
      const worker = await system.startWorker();
      const { time } = await worker.untilLogged('run refused: the job is run by a worker that lives', id);
      const delayed = `${system.settings.QUEUE_PREFIX}:scenario-jobs:delayed`;
      const score = await eventually('it waits for its turn', () => system.redis.zscore(delayed, id));
      const due = Number(score) / 4096;
      expect(due).toBeGreaterThanOrEqual(Date.parse(time as string) + 2000);
      expect(due).toBeLessThan(Date.now() + 2001);
      expect(worker.logged('run began', id)).toBeUndefined();
    } finally {
      await system.stop();
    }
  });
});

describe('a worker that is handed a job which its database does not have', () => {
  it('says so, and begins nothing', async () => {
    const system = await TestSystem.start({ workers: 0 });
    const { id } = await system.create('quick');
    await system.pool.query('DELETE FROM scenario_jobs WHERE id = $1', [id]);
    const worker = await system.startWorker();
    const { level } = await worker.untilLogged(
      'run refused: this database has no such job; does another one use this queue, by the same QUEUE_PREFIX?',
      id,
    );
    expect(level).toBe('warn');
    expect(worker.logged('run began', id)).toBeUndefined();
    await system.stop();
  });
});

describe('a worker that asks Postgres about its runs', () => {
  let system: TestSystem;
  afterEach(() => system.stop());

  it('ends one that another worker has taken over, and records nothing', async () => {
    system = await TestSystem.start();
    const { job, pid } = await system.createRunning('cooperative');
    await system.pool.query("INSERT INTO workers (id) VALUES ('another')");
    const { rows } = await system.pool.query(
      "UPDATE scenario_jobs SET run_id = gen_random_uuid(), worker_id = 'another', attempt = 2 WHERE id = $1 RETURNING *",
      [job.id],
    );
    expect(await system.workers[0]!.untilLogged('run ended', job.id)).toMatchObject({ outcome: 'superseded' });
    expect(await groupIsAlive(pid)).toBe(false);
    expect(await system.row(job.id)).toEqual(rows[0]);
  });

  it('does not end one whose claim has not been answered yet', async () => {
    system = await TestSystem.start({ workers: 0 });
    const { id } = await system.create('quick');
    await system.lockRow(id, async () => {
      await system.startWorker();
      await eventually('it has asked while its claim waits', async () => {
        const { rows } = await system.pool.query(`
          SELECT FROM workers w, pg_stat_activity claim
          WHERE claim.datname = current_database() AND claim.wait_event_type = 'Lock'
            AND w.seen_at > claim.query_start + interval '500 ms'`);
        return rows.length > 0;
      });
    });
    await system.untilStatus(id, 'completed');
    expect((await system.row(id)).attempt).toBe(1);
  });
});

describe('a worker that begins a run while it asks which of its runs were cancelled', () => {
  it('does not take the answer, which does not know the run, for an answer about it', async () => {
    await whileBehindProxy('worker', NO_POLL, {}, async ({ proxy, system }) => {
      const { rows } = await eventually('the worker is known', async () => {
        const found = await system.pool.query<{ id: string }>('SELECT id FROM workers');
        return found.rowCount === 1 && found;
      });
      const held = proxy.holdAnswer('cancelledSeconds');
      await system.redis.publish(`${system.settings.QUEUE_PREFIX}:cancel:${rows[0]!.id}`, '');
      const pass = await held;
      const { job, finish } = await system.createPatient();
      pass();
      await finish();
      await system.untilStatus(job.id, 'completed');
      expect((await system.row(job.id)).attempt).toBe(1);
    });
  });
});

describe('a worker that hears a message without a token while it asks Postgres because of another', () => {
  it('asks once more', async () => {
    await whileBehindProxy('worker', NO_POLL, { api: await mute() }, async ({ proxy, system }) => {
      const [first, second] = [await system.createRunning('cooperative'), await system.createRunning('cooperative')];
      const channel = `${system.settings.QUEUE_PREFIX}:cancel:${(await system.row(first.job.id)).worker_id}`;
      const held = proxy.holdAnswer('cancelledSeconds');
      await system.cancel(first.job.id);
      await system.redis.publish(channel, '');
      const pass = await held;
      await system.cancel(second.job.id);
      await system.redis.publish(channel, '');
      pass();
      await system.untilStopped(first.job.id);
      await system.untilStopped(second.job.id);
    });
  });
});

describe('a worker whose doorbell rings while it asks Postgres, before and after it has subscribed anew', () => {
  it('gives its sign of life all the same', async () => {
    const user = await RedisUser.create();
    await whileBehindProxy('worker', { ...NO_POLL, ...user.settings }, {}, async ({ proxy, system }) => {
      const jobs: { id: string }[] = [];
      while (jobs.length < 3) jobs.push((await system.createRunning('cooperative')).job);
      const channel = `${system.settings.QUEUE_PREFIX}:cancel:${(await system.row(jobs[0]!.id)).worker_id}`;
      const subscribed = async () => (await system.redis.pubsub('NUMSUB', channel))[1] === 1;
      /** Rings, and waits until the worker has heard it: a later message on the same connection has arrived. */
      const ring = async () => {
        await system.redis.publish(channel, '');
        const { id } = jobs.pop()!;
        expect((await system.cancel(id)).status).toBe(200);
        await stoppingOf(system, id);
      };
      const lastSign = async () =>
        (await system.pool.query<{ seen: string }>('SELECT seen_at::text AS seen FROM workers')).rows[0]!.seen;

      const held = proxy.holdAnswer('cancelledSeconds');
      await system.redis.publish(channel, '');
      const pass = await held;
      await ring();
      const before = await lastSign();
      await user.cut();
      await eventually('it has subscribed', subscribed);
      await ring();
      // By now the worker has queued another question, whichever of the two came first.
      await ring();
      pass();
      await eventually('it gives its sign of life', async () => (await lastSign()) !== before);
    });
  });
});
