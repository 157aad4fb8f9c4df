-- As before, but finds the job by its primary key: with statistics that do not know the workspace, Postgres read all jobs
-- of the workspace for each that completed.
CREATE OR REPLACE FUNCTION "scenarios_need_completed_job"() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (
    SELECT FROM "scenario_jobs" j
    WHERE j.id = NEW.job_id AND (j.workspace_id = NEW.workspace_id) IS TRUE AND j.status = 'completed'
  ) THEN
    RAISE EXCEPTION 'scenario % needs job % to be completed', NEW.id, NEW.job_id USING ERRCODE = 'check_violation';
  END IF;
  RETURN NULL;
END $$;
