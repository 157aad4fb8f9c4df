CREATE TYPE "job_status" AS ENUM ('queued', 'processing', 'completed', 'failed', 'cancelled');
CREATE TYPE "stop_kind" AS ENUM ('graceful', 'terminated', 'killed', 'worker_lost');

CREATE TABLE "workspaces" (
  "id" TEXT NOT NULL,
  "slug" TEXT NOT NULL,
  "active" BOOLEAN NOT NULL DEFAULT true,
  "created_at" TIMESTAMPTZ(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
  CONSTRAINT "workspaces_pkey" PRIMARY KEY ("id"),
  CONSTRAINT "workspaces_slug_is_a_dns_label" CHECK ("slug" ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$')
);
CREATE UNIQUE INDEX "workspaces_slug_key" ON "workspaces" ("slug");

CREATE TABLE "api_keys" (
  "id" TEXT NOT NULL,
  "workspace_id" TEXT NOT NULL,
  "name" TEXT NOT NULL,
  "hash" TEXT NOT NULL,
  "created_at" TIMESTAMPTZ(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
  "expires_at" TIMESTAMPTZ(3),
  "revoked_at" TIMESTAMPTZ(3),
  CONSTRAINT "api_keys_pkey" PRIMARY KEY ("id"),
  CONSTRAINT "api_keys_hash_is_sha256" CHECK ("hash" ~ '^[0-9a-f]{64}$')
);
CREATE UNIQUE INDEX "api_keys_hash_key" ON "api_keys" ("hash");
CREATE INDEX "api_keys_workspace_id_idx" ON "api_keys" ("workspace_id");

CREATE TABLE "scenario_jobs" (
  "id" TEXT NOT NULL,
  "workspace_id" TEXT NOT NULL,
  "status" "job_status" NOT NULL DEFAULT 'queued',
  "request_id" TEXT,
  "user_email" TEXT NOT NULL,
  "prompt" TEXT NOT NULL,
  "context" TEXT,
  "scenario_slug" TEXT,
  "attempt" INTEGER NOT NULL DEFAULT 0,
  "run_id" UUID,
  "worker_id" TEXT,
  "error_code" TEXT,
  "error_message" TEXT,
  "created_at" TIMESTAMPTZ(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
  "started_at" TIMESTAMPTZ(3),
  "completed_at" TIMESTAMPTZ(3),
  "cancelled_by" TEXT,
  "cancel_idempotency_key" TEXT,
  "stopped_at" TIMESTAMPTZ(3),
  "stopped_how" "stop_kind",
  CONSTRAINT "scenario_jobs_pkey" PRIMARY KEY ("id"),
  CONSTRAINT "scenario_jobs_id_format" CHECK ("id" ~ '^[a-z0-9]{12}$'),
  CONSTRAINT "scenario_jobs_completed_at_iff_terminal"
    CHECK (("completed_at" IS NOT NULL) = ("status" IN ('completed', 'failed', 'cancelled'))),
  CONSTRAINT "scenario_jobs_run_has_a_worker" CHECK (("run_id" IS NULL) = ("worker_id" IS NULL)),
  CONSTRAINT "scenario_jobs_queued_has_no_run" CHECK ("status" <> 'queued' OR "run_id" IS NULL),
  CONSTRAINT "scenario_jobs_run_has_started"
    CHECK ("status" NOT IN ('processing', 'completed', 'failed') OR ("run_id" IS NOT NULL AND "started_at" IS NOT NULL)),
  CONSTRAINT "scenario_jobs_duration_not_negative" CHECK ("completed_at" >= "started_at"),
  CONSTRAINT "scenario_jobs_error_iff_failed"
    CHECK (("error_code" IS NOT NULL) = ("status" = 'failed') AND ("error_message" IS NOT NULL) = ("status" = 'failed')),
  CONSTRAINT "scenario_jobs_canceller_iff_cancelled" CHECK (("cancelled_by" IS NOT NULL) = ("status" = 'cancelled')),
  CONSTRAINT "scenario_jobs_idempotency_key_of_a_cancel"
    CHECK ("cancel_idempotency_key" IS NULL OR "status" = 'cancelled'),
  CONSTRAINT "scenario_jobs_stopped_together" CHECK (("stopped_at" IS NULL) = ("stopped_how" IS NULL)),
  CONSTRAINT "scenario_jobs_stopped_a_cancelled_run"
    CHECK ("stopped_at" IS NULL OR ("status" = 'cancelled' AND "run_id" IS NOT NULL)),
  CONSTRAINT "scenario_jobs_attempt_not_negative" CHECK ("attempt" >= 0)
);
CREATE UNIQUE INDEX "scenario_jobs_workspace_id_request_id_key" ON "scenario_jobs" ("workspace_id", "request_id");
-- What the reconciler pages through, and what the gauges count: only the jobs that are not finished.
CREATE INDEX "scenario_jobs_unfinished" ON "scenario_jobs" ("status", "id") WHERE "status" IN ('queued', 'processing');
-- What each poll of a worker asks: the runs that it still owes an answer for.
CREATE INDEX "scenario_jobs_owed_by_worker" ON "scenario_jobs" ("worker_id")
  WHERE "worker_id" IS NOT NULL AND "status" IN ('processing', 'cancelled') AND "stopped_at" IS NULL;

CREATE TABLE "scenarios" (
  "id" TEXT NOT NULL,
  "workspace_id" TEXT NOT NULL,
  "job_id" TEXT NOT NULL,
  "slug" TEXT NOT NULL,
  "name" TEXT NOT NULL,
  "content" JSONB NOT NULL,
  "created_at" TIMESTAMPTZ(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
  CONSTRAINT "scenarios_pkey" PRIMARY KEY ("id")
);
CREATE UNIQUE INDEX "scenarios_job_id_key" ON "scenarios" ("job_id");
CREATE UNIQUE INDEX "scenarios_workspace_id_slug_key" ON "scenarios" ("workspace_id", "slug");

CREATE TABLE "workers" (
  "id" TEXT NOT NULL,
  "started_at" TIMESTAMPTZ(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
  "seen_at" TIMESTAMPTZ(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
  CONSTRAINT "workers_pkey" PRIMARY KEY ("id")
);

ALTER TABLE "api_keys" ADD CONSTRAINT "api_keys_workspace_id_fkey"
  FOREIGN KEY ("workspace_id") REFERENCES "workspaces" ("id") ON DELETE RESTRICT ON UPDATE CASCADE;
ALTER TABLE "scenario_jobs" ADD CONSTRAINT "scenario_jobs_workspace_id_fkey"
  FOREIGN KEY ("workspace_id") REFERENCES "workspaces" ("id") ON DELETE RESTRICT ON UPDATE CASCADE;
ALTER TABLE "scenario_jobs" ADD CONSTRAINT "scenario_jobs_cancelled_by_fkey"
  FOREIGN KEY ("cancelled_by") REFERENCES "api_keys" ("id") ON DELETE RESTRICT ON UPDATE CASCADE;
ALTER TABLE "scenarios" ADD CONSTRAINT "scenarios_workspace_id_fkey"
  FOREIGN KEY ("workspace_id") REFERENCES "workspaces" ("id") ON DELETE RESTRICT ON UPDATE CASCADE;
ALTER TABLE "scenarios" ADD CONSTRAINT "scenarios_job_id_fkey"
  FOREIGN KEY ("job_id") REFERENCES "scenario_jobs" ("id") ON DELETE RESTRICT ON UPDATE CASCADE;

-- A job begins queued, whatever inserts it.
CREATE FUNCTION "scenario_jobs_refuse_insert"() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'job % must begin queued, not %', NEW.id, NEW.status USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER "scenario_jobs_begin_queued" BEFORE INSERT ON "scenario_jobs"
  FOR EACH ROW WHEN (NEW.status <> 'queued') EXECUTE FUNCTION "scenario_jobs_refuse_insert"();

-- A queued job can be claimed or cancelled, nothing else.
CREATE FUNCTION "scenario_jobs_refuse_transition"() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'job % cannot go from % to %', OLD.id, OLD.status, NEW.status USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER "scenario_jobs_no_result_without_run" BEFORE UPDATE ON "scenario_jobs"
  FOR EACH ROW WHEN (OLD.status = 'queued' AND NEW.status IN ('completed', 'failed'))
  EXECUTE FUNCTION "scenario_jobs_refuse_transition"();

-- A finished job never changes again. The one exception: how a cancelled run's process ended, once.
CREATE FUNCTION "scenario_jobs_keep_finished"() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  allowed "scenario_jobs" := OLD;
BEGIN
  IF OLD.stopped_at IS NULL THEN
    allowed.stopped_at := NEW.stopped_at;
    allowed.stopped_how := NEW.stopped_how;
  END IF;
  IF allowed IS DISTINCT FROM NEW THEN
    RAISE EXCEPTION 'job % is % and can no longer change', OLD.id, OLD.status USING ERRCODE = 'check_violation';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER "scenario_jobs_finished_is_final" BEFORE UPDATE ON "scenario_jobs"
  FOR EACH ROW WHEN (OLD.status IN ('completed', 'failed', 'cancelled'))
  EXECUTE FUNCTION "scenario_jobs_keep_finished"();

-- A scenario exists if and only if its job completed. Checked at commit, so that the two rows can be
-- written in either order.
CREATE FUNCTION "scenarios_need_completed_job"() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (
    SELECT FROM "scenario_jobs" j
    WHERE j.id = NEW.job_id AND j.workspace_id = NEW.workspace_id AND j.status = 'completed'
  ) THEN
    RAISE EXCEPTION 'scenario % needs job % to be completed', NEW.id, NEW.job_id USING ERRCODE = 'check_violation';
  END IF;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER "scenarios_of_completed_jobs" AFTER INSERT OR UPDATE ON "scenarios"
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION "scenarios_need_completed_job"();

CREATE FUNCTION "scenario_jobs_completed_need_scenario"() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM "scenarios" s WHERE s.job_id = NEW.id) THEN
    RAISE EXCEPTION 'job % cannot be completed without a scenario', NEW.id USING ERRCODE = 'check_violation';
  END IF;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER "scenario_jobs_completed_with_scenario" AFTER UPDATE ON "scenario_jobs"
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.status = 'completed')
  EXECUTE FUNCTION "scenario_jobs_completed_need_scenario"();
