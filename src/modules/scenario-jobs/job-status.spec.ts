import { isCancellable, isTerminal, JOB_STATUSES } from './job-status';

describe('job statuses', () => {
  it('are terminal when nothing follows them', () => {
    expect(JOB_STATUSES.filter(isTerminal)).toEqual(['completed', 'failed', 'cancelled']);
  });

  it('can be cancelled until then', () => {
    expect(JOB_STATUSES.filter(isCancellable)).toEqual(['queued', 'processing']);
  });
});
