# One image, three commands:
#   node dist/main.api.js      (the default)
#   node dist/main.worker.js
#   node dist/cli/migrate.js
# A worker starts processes of its own: run it with an init process (`docker run --init`, `init: true` in compose),
# so that whatever they leave behind is buried.

FROM node:24-slim AS build
WORKDIR /app
COPY package.json package-lock.json .npmrc ./
RUN npm ci
COPY . .
RUN npm run build

FROM node:24-slim AS packages
WORKDIR /app
COPY package.json package-lock.json .npmrc ./
RUN npm ci --omit=dev --omit=optional --omit=peer

FROM node:24-slim
ENV NODE_ENV=production NODE_OPTIONS=--enable-source-maps
WORKDIR /app
COPY --from=packages /app/node_modules node_modules
COPY --from=build /app/dist dist
COPY package.json ./
COPY prisma prisma
USER node
EXPOSE 3000 3001
CMD ["node", "dist/main.api.js"]
