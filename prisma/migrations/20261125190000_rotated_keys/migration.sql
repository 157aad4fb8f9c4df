-- A key is rotated once: while it overlaps with the one that takes its place, its expiry is no longer its own.
ALTER TABLE "api_keys" ADD COLUMN "rotated_at" TIMESTAMPTZ(3);
