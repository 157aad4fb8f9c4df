import { toApiError } from './error.filter';

describe('a request that takes longer than it may', () => {
  it('is a 503, to be sent again', () => {
    const { code, status, headers } = toApiError(
      Object.assign(new Error('Request timed out'), { code: 'FST_ERR_HANDLER_TIMEOUT', statusCode: 503 }),
    );
    expect({ code, status, headers }).toEqual({
      code: 'service_unavailable',
      status: 503,
      headers: { 'retry-after': '2' },
    });
  });
});
