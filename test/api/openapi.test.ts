import contract from '../../docs/contract.json';
import { TestSystem } from '../support/test-system';

const PATH = '/scenario-studio/jobs/{job_id}';

type Document = typeof contract & {
  openapi: string;
  servers: { url: string }[];
  paths: Record<string, Record<string, { operationId: string; responses: object; security?: object[] }>>;
  security: object[];
};

describe('the OpenAPI document', () => {
  let system: TestSystem;
  let served: Document;
  beforeAll(async () => {
    system = await TestSystem.start({ workers: 0 });
    served = (await (await fetch(`${system.api.url}/openapi.json`)).json()) as Document;
  });
  afterAll(() => system.stop());

  const agreed = contract.paths[PATH].delete;

  it.each(Object.keys(agreed).filter((field) => field !== 'parameters') as (keyof typeof agreed)[])(
    'describes the cancel operation as the contract does: %s',
    (field) => {
      const described = served.paths[PATH].delete[field];
      // The service answers everything in the contract unchanged, and more besides.
      expect(described).toEqual(field === 'responses' ? expect.objectContaining(agreed.responses) : agreed[field]);
    },
  );

  it('describes what else every operation may answer', () => {
    for (const operations of Object.values(served.paths)) {
      for (const { responses } of Object.values(operations as Record<string, { responses: object }>)) {
        expect(Object.keys(responses)).toEqual(expect.arrayContaining(['401', '403', '503', 'default']));
      }
    }
  });

  it('has the parameters of the contract, and the Idempotency-Key besides', () => {
    const { parameters } = served.paths[PATH].delete;
    expect(parameters).toEqual(expect.arrayContaining(agreed.parameters));
    expect(parameters.map(({ name }) => name).sort()).toEqual(['Idempotency-Key', 'job_id']);
  });

  it.each([
    ['schemas', 'ScenarioJob'],
    ['schemas', 'ValidationErrorDetail'],
    ['responses', 'Unauthorized'],
    ['securitySchemes', 'bearerAuth'],
  ])('has the component of the contract: %s %s', (kind, name) => {
    const component = (document: unknown) =>
      (document as { components: Record<string, Record<string, unknown>> }).components[kind]?.[name];
    expect(component(served)).toEqual(component(contract));
  });

  it('has all three operations, below the base path, behind a key', () => {
    expect(served.openapi).toBe('3.0.3');
    expect(served.servers).toEqual([{ url: '/rest/v1' }]);
    expect(served.security).toEqual([{ bearerAuth: [] }]);
    const operations = Object.entries(served.paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, { operationId }]) => `${method} ${path} ${operationId}`),
    );
    expect(operations.sort()).toEqual([
      `delete ${PATH} cancelScenarioJob`,
      `get ${PATH} getScenarioJob`,
      'post /scenario-studio/jobs createScenarioJob',
    ]);
  });

  it('can be browsed', async () => {
    const page = await fetch(`${system.api.url}/docs`);
    expect(page.headers.get('content-type')).toMatch(/^text\/html/);
    expect(await page.text()).toContain('Swagger UI');
  });
});
