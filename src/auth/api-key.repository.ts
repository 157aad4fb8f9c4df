import { Injectable } from '@nestjs/common';
import { Prisma } from '../generated/prisma/client';
import { Batches } from '../infrastructure/batches';
import { Database } from '../infrastructure/database';
import { newId } from '../infrastructure/ids';
import { hashApiKey, newApiKey } from './api-key';
import { type Caller } from './caller';

/** The caller that a key identifies, and whether its workspace is active. */
type KeyOwner = Caller & { workspaceActive: boolean };

/** What may be shown of a key: everything but the key itself. */
export type ListedKey = {
  id: string;
  name: string;
  createdAt: Date;
  expiresAt: Date | null;
  revokedAt: Date | null;
  rotatedAt: Date | null;
  workspace: { slug: string; active: boolean };
};

/** SQL condition: the key `k` is neither revoked nor expired. */
export const KEY_WORKS = Prisma.sql`(k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now()))`;

/** API keys and the workspaces they belong to. Only hashes of keys are ever stored or compared. */
@Injectable()
export class ApiKeyRepository {
  private readonly lookUps = new Batches<string, KeyOwner | undefined>((hashes) => this.findOwners(hashes));

  constructor(private readonly database: Database) {}

  /**
   * The owner of the key with this hash, or undefined if it is unknown, expired or revoked. Asks Postgres each time.
   */
  async findOwner(hash: string): Promise<KeyOwner | undefined> {
    return this.lookUps.call(hash);
  }

  private async findOwners(hashes: string[]): Promise<(KeyOwner | undefined)[]> {
    const rows = await this.database.$queryRaw<(KeyOwner & { hash: string })[]>`
      SELECT k.hash, k.id AS "keyId", w.id AS "workspaceId", w.slug AS "workspaceSlug",
             w.active AS "workspaceActive"
      FROM api_keys k JOIN workspaces w ON w.id = k.workspace_id
      WHERE k.hash = ANY (${[...new Set(hashes)]}::text[]) AND ${KEY_WORKS}`;
    const owners = new Map(rows.map(({ hash, ...owner }) => [hash, owner]));
    return hashes.map((hash) => owners.get(hash));
  }

  /** The time by the clock of Postgres, which decides when a key expires. */
  async now(): Promise<Date> {
    const [{ now }] = await this.database.$queryRaw<[{ now: Date }]>`SELECT now()`;
    return now;
  }

  /** Creates a key and returns it; it cannot be shown again. Creates the workspace if it does not exist. */
  async create(workspaceSlug: string, name: string, expiresAt: Date | null): Promise<{ id: string; key: string }> {
    const workspace = await this.database.workspace.upsert({
      where: { slug: workspaceSlug },
      create: { id: newId(), slug: workspaceSlug },
      update: {},
    });
    return insertKey(this.database, workspace.id, name, expiresAt);
  }

  async list(workspaceSlug?: string): Promise<ListedKey[]> {
    return this.database.apiKey.findMany({
      where: workspaceSlug === undefined ? {} : { workspace: { slug: workspaceSlug } },
      select: {
        id: true,
        name: true,
        createdAt: true,
        expiresAt: true,
        revokedAt: true,
        rotatedAt: true,
        workspace: { select: { slug: true, active: true } },
      },
      orderBy: [{ workspace: { slug: 'asc' } }, { createdAt: 'asc' }],
    });
  }

  /** Revokes a key at once. Returns false if there is no such key or it was revoked before. */
  async revoke(id: string): Promise<boolean> {
    const { count } = await this.database.apiKey.updateMany({
      where: { id, revokedAt: null },
      data: { revokedAt: await this.now() },
    });
    return count > 0;
  }

  /**
   * Creates a key with the name and workspace of key `id`, which stops working at `oldEndsAt` at the latest. The new
   * key expires at `newExpiresAt`, or else when the old one would have. Returns undefined if the old key does not
   * exist, no longer works, or was rotated before.
   */
  async rotate(
    id: string,
    oldEndsAt: Date,
    newExpiresAt?: Date,
  ): Promise<{ id: string; key: string; expiresAt: Date | null } | undefined> {
    const now = await this.now();
    const ends = oldEndsAt <= now ? { revokedAt: now } : { expiresAt: oldEndsAt };
    return this.database.$transaction(async (transaction) => {
      const old = await transaction.apiKey.findFirst({ where: { id } });
      if (!old) return undefined;
      const endsSooner = old.expiresAt !== null && old.expiresAt <= oldEndsAt;
      const { count } = await transaction.apiKey.updateMany({
        where: { id, rotatedAt: null, revokedAt: null, OR: [{ expiresAt: null }, { expiresAt: { gt: now } }] },
        data: { rotatedAt: now, ...(!endsSooner && ends) },
      });
      if (count === 0) return undefined;
      const expiresAt = newExpiresAt ?? old.expiresAt;
      return { ...(await insertKey(transaction, old.workspaceId, old.name, expiresAt)), expiresAt };
    });
  }
}

async function insertKey(
  database: Pick<Database, 'apiKey'>,
  workspaceId: string,
  name: string,
  expiresAt: Date | null,
): Promise<{ id: string; key: string }> {
  const key = newApiKey();
  const { id } = await database.apiKey.create({
    data: { id: newId(), workspaceId, name, expiresAt, hash: hashApiKey(key) },
  });
  return { id, key };
}
