CREATE OR REPLACE FUNCTION job_insert(jobs jsonb, process text, keep boolean, wait boolean)
RETURNS TABLE (job_id uuid, job_created_at timestamptz, job_next_run_at timestamptz)
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- Insert jobs, except those whose type already has a job with the idempotency key, and announce
-- them.
--
-- Every insert of a key takes the advisory lock of the key first, in a fixed order. If another
-- transaction has the lock, the job is left out, so that a caller's long transaction does not
-- delay other jobs. With `wait`, wait for the lock.
DECLARE
    now CONSTANT timestamptz := clock_timestamp();
    events jsonb[] := '{}';
    made record;
BEGIN
    FOR made IN
        WITH new AS MATERIALIZED (
            SELECT each_job.* FROM jsonb_to_recordset(jobs) AS each_job (
                id uuid, type text, fingerprint text, payload text, priority smallint,
                max_attempts integer, timeout_seconds integer,
                backoff_base_seconds double precision, backoff_cap_seconds double precision,
                next_run_at timestamptz, idempotency_key text, created_by text, traceparent text)
            ORDER BY each_job.type, each_job.idempotency_key, each_job.id
        ), free AS MATERIALIZED (
            SELECT new.* FROM new
            WHERE new.idempotency_key IS NULL
               OR job_key_locked(new.type, new.idempotency_key, wait)
        )
        INSERT INTO job (
            id, type, fingerprint, status, payload, priority, attempt, max_attempts,
            timeout_seconds, backoff_base_seconds, backoff_cap_seconds, idempotency_key,
            created_by, traceparent, created_at, next_run_at)
        SELECT free.id, free.type, free.fingerprint, 'queued', CAST(free.payload AS jsonb),
            free.priority, 0, free.max_attempts, free.timeout_seconds, free.backoff_base_seconds,
            free.backoff_cap_seconds, free.idempotency_key, free.created_by,
            free.traceparent, now, coalesce(free.next_run_at, now)
        FROM free
        ON CONFLICT (type, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING id, type, created_at, next_run_at
    LOOP
        job_id := made.id;
        job_created_at := made.created_at;
        job_next_run_at := made.next_run_at;
        events := events || (job_event('job.created', made.id, made.type, 0) -> 0);
        RETURN NEXT;
    END LOOP;
    IF events <> '{}' THEN
        PERFORM job_announce(process, to_jsonb(events), keep);
    END IF;
END $$;
