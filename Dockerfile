# One image, three commands:
#   dist/main.api.js      (the default, with flags of its own)
#   dist/main.worker.js
#   dist/cli/migrate.js
# A worker starts processes of its own: run it with an init process (`docker run --init`, `init: true` in compose), so
# that whatever they leave behind is reaped.

FROM node:24-slim AS build
WORKDIR /app
COPY package.json package-lock.json .npmrc ./
RUN npm ci
COPY . .
# Readable by every user, whatever the umask of whoever made the clone.
RUN npm run build && chmod -R a+rX package.json prisma

FROM node:24-slim AS packages
WORKDIR /app
COPY package.json package-lock.json .npmrc ./
RUN npm ci --omit=dev --omit=optional --omit=peer

FROM node:24-slim
ENV NODE_ENV=production
WORKDIR /app
COPY --from=packages /app/node_modules node_modules
COPY --from=build /app/dist dist
COPY --from=build /app/package.json ./
COPY --from=build /app/prisma prisma
USER node
EXPOSE 3000 3001
# The flags are those of package.json; those in CMD are for an api alone. docs/operations.md says what they are for.
ENTRYPOINT ["node", "--enable-source-maps", "--no-memory-reducer"]
CMD ["--min-semi-space-size=64", "--max-semi-space-size=64", "--no-allocation-site-pretenuring", "dist/main.api.js"]
