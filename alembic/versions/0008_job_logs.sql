CREATE FUNCTION job_store_logs(kept jsonb, process text, keep boolean) RETURNS void
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- Replace the log lines of attempts, whether or not their lease is in force. A row that another
-- transaction has locked is left as it is. Running jobs are announced.
DECLARE
    events jsonb;
BEGIN
    WITH asked AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(kept) AS each_log (id uuid, token text, lines text)
    ), found AS MATERIALIZED (
        SELECT asked.lines, asked.token, attempt.id FROM asked CROSS JOIN LATERAL (
            SELECT job_attempt.id FROM job_attempt
            WHERE job_attempt.job_id = asked.id AND job_attempt.lease_token = asked.token
            FOR UPDATE SKIP LOCKED
        ) AS attempt
    ), stored AS (
        UPDATE job_attempt SET logs = found.lines FROM found WHERE job_attempt.id = found.id
        RETURNING job_attempt.job_id, job_attempt.attempt, found.token
    )
    SELECT jsonb_agg(job_event('job.progressed', job.id, job.type, stored.attempt) -> 0)
    INTO events FROM stored JOIN job ON job.id = stored.job_id
    WHERE job.status = 'running' AND job.lease_token = stored.token;
    IF events IS NOT NULL THEN
        PERFORM job_announce(process, events, keep);
    END IF;
END $$;
