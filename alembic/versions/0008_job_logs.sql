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

CREATE OR REPLACE FUNCTION job_succeed(reports jsonb, process text, keep boolean) RETURNS SETOF job
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- End attempts as succeeded, if the lease is in force, store their log lines, and announce that. Of
-- the jobs, only the id, type, status and attempt are returned.
--
-- It does what `job_end` does for this outcome. As there, rows that another transaction has locked
-- are left out, and so are lost leases.
DECLARE
    now CONSTANT timestamptz := clock_timestamp();
    events jsonb[] := '{}';
    ended record;
    narrow job;
BEGIN
    FOR ended IN
        WITH held AS MATERIALIZED (
            SELECT report.id, report.result, report.logs
            FROM jsonb_to_recordset(reports)
                AS report (id uuid, token text, result text, logs text)
            CROSS JOIN LATERAL (
                SELECT FROM job
                WHERE job.id = report.id AND job.lease_token = report.token
                  AND CASE WHEN job.status = 'running' THEN job.lease_expires_at > now
                      ELSE false END
                FOR UPDATE SKIP LOCKED) AS running
        ), closed AS (
            UPDATE job_attempt SET
                finished_at = now, outcome = 'succeeded',
                logs = coalesce(held.logs, job_attempt.logs)
            -- Found job by job. The planner takes the index of open attempts for empty, and would
            -- read all of it: during a long transaction it has an entry of every attempt since.
            FROM held WHERE job_attempt.id = (
                SELECT open.id FROM job_attempt AS open
                WHERE open.job_id = held.id AND open.finished_at IS NULL)
        )
        UPDATE job SET
            status = 'succeeded', finished_at = now, quick_returns = 0,
            result = CAST(held.result AS jsonb), error = NULL,
            lease_expires_at = NULL, deadline_at = NULL, held_until = NULL
        FROM held WHERE job.id = held.id
        RETURNING job.id, job.type, job.attempt, job.returns
    LOOP
        events := events || (job_event('job.succeeded', ended.id, ended.type, ended.attempt) -> 0);
        IF (ended.attempt + ended.returns) % 32 = 0 THEN
            PERFORM job_forget_attempts(ended.id, ended.attempt + ended.returns);
        END IF;
        narrow.id := ended.id;
        narrow.type := ended.type;
        narrow.status := 'succeeded';
        narrow.attempt := ended.attempt;
        RETURN NEXT narrow;
    END LOOP;
    IF events <> '{}' THEN
        PERFORM job_announce(process, to_jsonb(events), keep);
    END IF;
END $$;
