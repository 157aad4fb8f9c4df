import { type INestApplication } from '@nestjs/common';
import { DocumentBuilder, type OpenAPIObject, SwaggerModule } from '@nestjs/swagger';
import { errorContent, ValidationErrorDetail } from './openapi-errors';
import { PROBES } from './probes';

/** The OpenAPI document of the api. */
function describeApi(app: INestApplication): OpenAPIObject {
  const config = new DocumentBuilder()
    .setOpenAPIVersion('3.0.3')
    .setTitle('Exec API')
    .setVersion('1.0')
    .setDescription(
      'Creates scenarios in the background, and cancels them for real.\n\n' +
        '## Authentication\n\n' +
        'All requests require a valid API key passed in the Authorization header:\n\n' +
        '```\nAuthorization: Bearer exec_live_...\n```\n\n' +
        'Create API keys in your workspace settings under **Settings > API**.\n',
    )
    .addSecurity('bearerAuth', {
      type: 'http',
      scheme: 'bearer',
      description:
        'API key created in Settings > API.\n\nFormat: `exec_live_` followed by 40 alphanumeric characters.\n',
    })
    .addSecurityRequirements('bearerAuth')
    .addServer('/rest/v1')
    .build();
  const document = SwaggerModule.createDocument(app, config, {
    extraModels: [ValidationErrorDetail],
    ignoreGlobalPrefix: true,
  });
  for (const path of PROBES) delete document.paths[path];

  // The responses that every operation may give are described once.
  document.components ??= {};
  document.components.responses = {
    Unauthorized: {
      description: 'Missing or invalid API key',
      content: errorContent('invalid_api_key', 'Invalid or inactive API key'),
    },
    Forbidden: {
      description: 'The workspace of the API key is inactive',
      content: errorContent('workspace_inactive', 'Workspace is inactive'),
    },
    Unavailable: {
      description: 'The service cannot answer now; the request may have had its effect. Try again',
      headers: { 'Retry-After': { description: 'Seconds to wait', schema: { type: 'integer' } } },
      content: errorContent('service_unavailable', 'The service is temporarily unavailable, please try again'),
    },
    Error: {
      description: 'Any other error, in the same envelope',
      content: errorContent('internal_error', 'An unexpected error occurred'),
    },
  };
  for (const path of Object.values(document.paths)) {
    for (const operation of [path.get, path.post, path.delete]) {
      if (!operation) continue;
      Object.assign(operation.responses, {
        401: { $ref: '#/components/responses/Unauthorized' },
        403: { $ref: '#/components/responses/Forbidden' },
        503: { $ref: '#/components/responses/Unavailable' },
        default: { $ref: '#/components/responses/Error' },
      });
    }
  }
  return document;
}

/** Serves the document at /openapi.json, and a page to browse and try it at /docs. */
export function serveApiDescription(app: INestApplication): void {
  SwaggerModule.setup('docs', app, describeApi(app), { jsonDocumentUrl: 'openapi.json', raw: ['json'] });
}
