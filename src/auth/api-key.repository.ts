import { Injectable } from '@nestjs/common';
import { Prisma } from '../generated/prisma/client';
import { Batches } from '../infrastructure/batches';
import { Database } from '../infrastructure/database';
import { newId } from '../infrastructure/ids';
import { hashApiKey, newApiKey } from './api-key';
import { type Caller } from './caller';

/** Whom a key speaks for. */
type KeyOwner = Caller & { workspaceActive: boolean };

/** A key as its owner may see it: everything but the key. */
export type ListedKey = {
  id: string;
  name: string;
  createdAt: Date;
  expiresAt: Date | null;
  revokedAt: Date | null;
  rotatedAt: Date | null;
  workspace: { slug: string; active: boolean };
};

/** The condition of a key `k` that works. */
export const KEY_WORKS = Prisma.sql`(k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now()))`;

/** API keys and the workspaces that they belong to. Only their hashes are ever stored or compared. */
@Injectable()
export class ApiKeyRepository {
  private readonly lookUps = new Batches<string, KeyOwner | undefined>((hashes) => this.findOwners(hashes));

  constructor(private readonly database: Database) {}

  /** Whose key has this hash, or undefined if it is unknown, expired or revoked. Asks Postgres each time. */
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

  /** The time by the clock that decides when a key expires. */
  async now(): Promise<Date> {
    const [{ now }] = await this.database.$queryRaw<[{ now: Date }]>`SELECT now()`;
    return now;
  }

  /** Makes a key and returns it: the only time that it can be seen. A workspace that is new is created. */
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

  /** Ends a key at once. False when there is no such key, or it was revoked before. */
  async revoke(id: string): Promise<boolean> {
    const { count } = await this.database.apiKey.updateMany({
      where: { id, revokedAt: null },
      data: { revokedAt: await this.now() },
    });
    return count > 0;
  }

  /**
   * Makes a key with the name and the workspace of another, which ends at `oldEndsAt`. It expires when it is told, or
   * else when that one would have. Returns undefined when there is no such key that still works, or another has taken
   * its place before.
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
