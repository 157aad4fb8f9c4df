// pg-boss's `cancel`, in process.
import pg from 'pg';
import { PgBoss } from 'pg-boss';
import { serve } from '../helper.mjs';
import { runAll } from '../loop.mjs';

const QUEUE = 'bench';
const connectionString = process.env.DATABASE_URL;
const pool = new pg.Pool({ connectionString, max: 1 });
let boss;

async function open() {
  // Nothing but the cancels: no maintenance, no schedules. As many connections as the service has.
  boss = new PgBoss({ connectionString, max: 10, supervise: false, schedule: false });
  boss.on('error', (error) => console.error(error));
  await boss.start();
  await boss.createQueue(QUEUE);
}

async function cancel({ count, concurrency }) {
  const data = { prompt: 'Discovery call with an IT director' };
  const ids = await boss.insert(
    QUEUE,
    Array.from({ length: count }, () => ({ data })),
    { returnId: true },
  );
  await pool.query('ANALYZE');
  const measured = await runAll(ids, concurrency, (id) => boss.cancel(QUEUE, id));
  const { rows } = await pool.query(
    `SELECT count(*)::int AS count FROM pgboss.job WHERE id = ANY ($1) AND state = 'cancelled'`,
    [ids],
  );
  if (rows[0].count !== count) throw new Error(`only ${rows[0].count} of ${count} jobs are cancelled`);
  return measured;
}

serve({ open, cancel });
