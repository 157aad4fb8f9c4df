-- Known to the worker that claimed the job and to whoever reads it here, which only a cancel does: its message proves by it
-- that the cancel is committed.
ALTER TABLE "scenario_jobs" ADD COLUMN "stop_token" UUID;
