import { Injectable } from '@nestjs/common';
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';

/** From a doorbell over loopback to a task that is killed after its full grace. */
const STOP_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 30, 60];
/** From an empty queue, or a task that fails at once, to the default of `TASK_TIMEOUT_MS` and twice that. */
const JOB_BUCKETS = [0.05, 0.1, 0.5, 1, 5, 15, 30, 60, 120, 300, 600, 900, 1800];
const HTTP_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5];

/** How many jobs wait, how many run, and how many cancelled runs are not yet confirmed to be gone. */
export type JobCounts = { queued: number; processing: number; stopping: number };

/** Every metric of both processes, described in docs/operations.md. */
@Injectable()
export class Metrics {
  readonly registry = new Registry();

  readonly httpSeconds = this.histogram('http_request_duration_seconds', 'HTTP requests', HTTP_BUCKETS, [
    'method',
    'route',
    'status',
  ]);
  readonly cancelRequests = this.counter('scenario_jobs_cancel_requests_total', 'Cancel requests', ['from', 'outcome']);
  readonly doorbells = this.counter('scenario_jobs_doorbells_total', 'Messages to the worker of a cancelled run', [
    'outcome',
  ]);
  readonly signalSeconds = this.histogram(
    'scenario_jobs_cancel_signal_seconds',
    'From the cancel to the moment that the worker knows of it, by what told it',
    STOP_BUCKETS,
    ['source'],
  );
  readonly stopSeconds = this.histogram(
    'scenario_jobs_cancel_stop_seconds',
    'From the cancel to the confirmed end of the whole process group, by how it ended',
    STOP_BUCKETS,
    ['how'],
  );
  readonly lateResults = this.counter(
    'scenario_jobs_late_results_refused_total',
    'Results that came after their job was cancelled or taken over',
    [],
  );
  readonly finished = this.counter('scenario_jobs_finished_total', 'Jobs that reached a terminal status', ['status']);
  readonly repairs = this.counter(
    'scenario_jobs_repairs_total',
    'Differences between rows, queue and workers that were repaired',
    ['repair'],
  );
  readonly waitSeconds = this.histogram(
    'scenario_jobs_wait_seconds',
    'From the create until the job was claimed for the first time',
    JOB_BUCKETS,
    [],
  );
  readonly runSeconds = this.histogram('scenario_jobs_run_seconds', 'How long tasks ran', JOB_BUCKETS, ['outcome']);
  readonly runs = this.gauge('scenario_jobs_runs_in_progress', 'Runs of this worker', []);

  constructor() {
    collectDefaultMetrics({ register: this.registry });
  }

  /**
   * Exports the numbers of jobs in the database, counted afresh at each scrape; nothing while they cannot be counted.
   */
  showJobs(count: () => Promise<JobCounts>): void {
    // Each gauge awaits the shared count of its scrape itself: prom-client prints a gauge without waiting for the
    // others.
    let counting: Promise<JobCounts | undefined> | undefined;
    const counted = () =>
      (counting ??= count()
        .catch(() => undefined)
        .finally(() => (counting = undefined)));

    this.gauge('scenario_jobs_unfinished', 'Jobs that wait or run', ['status'], async (gauge) => {
      const counts = await counted();
      gauge.reset();
      if (!counts) return;
      gauge.set({ status: 'queued' }, counts.queued);
      gauge.set({ status: 'processing' }, counts.processing);
    });
    this.gauge(
      'scenario_jobs_stops_unconfirmed',
      'Cancelled runs whose process is not yet known to be gone',
      [],
      async (gauge) => {
        const counts = await counted();
        // Not zero, which would say that all is well.
        if (counts) gauge.set(counts.stopping);
        else gauge.remove();
      },
    );
  }

  private counter<Label extends string>(name: string, help: string, labelNames: Label[]) {
    return new Counter({ name, help, labelNames, registers: [this.registry] });
  }

  private gauge<Label extends string>(
    name: string,
    help: string,
    labelNames: Label[],
    collect?: (gauge: Gauge<Label>) => Promise<void>,
  ) {
    const gauge = new Gauge({ name, help, labelNames, registers: [this.registry] });
    return collect ? Object.assign(gauge, { collect: () => collect(gauge) }) : gauge;
  }

  private histogram<Label extends string>(name: string, help: string, buckets: number[], labelNames: Label[]) {
    return new Histogram({ name, help, buckets, labelNames, registers: [this.registry] });
  }
}
