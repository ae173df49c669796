CREATE OR REPLACE FUNCTION job_next_level(
    name text, below smallint, due timestamptz, heads jsonb) RETURNS smallint
LANGUAGE plpgsql AS $$
-- Return the highest priority below `below` at which the type has a due job, or null. It reads one
-- entry of the index `job_claim` per priority.
DECLARE
    level smallint;
    head timestamptz;
BEGIN
    IF heads IS NOT NULL THEN
        -- Not EXISTS, which is planned as a join: where few jobs are expected, all due jobs of the
        -- type are read, and the entries of those that have run, before their priority is compared.
        SELECT max(known.level) INTO level
        FROM (
            SELECT CAST(value ->> 0 AS smallint) AS level, CAST(value ->> 1 AS timestamptz) AS head
            FROM jsonb_array_elements(heads)) AS known
        CROSS JOIN LATERAL (
            SELECT job.id FROM job
            WHERE job.status = 'queued' AND job.type = name AND job.priority = known.level
              AND job.next_run_at >= known.head AND job.next_run_at <= due
            ORDER BY job.priority DESC, job.next_run_at, job.id LIMIT 1) AS first
        WHERE known.level < below;
        RETURN level;
    END IF;
    LOOP
        SELECT job.priority, job.next_run_at INTO level, head FROM job
        WHERE job.status = 'queued' AND job.type = name AND job.priority < below
        ORDER BY job.priority DESC, job.next_run_at, job.id LIMIT 1;
        IF NOT FOUND THEN
            RETURN NULL;
        END IF;
        IF head <= due THEN
            RETURN level;
        END IF;
        below := level;
    END LOOP;
END $$;

CREATE OR REPLACE FUNCTION job_running(name text, at timestamptz) RETURNS integer
LANGUAGE plpgsql AS $$
-- Count the used places of a type's concurrency limit: its running jobs, and its timed-out attempts
-- whose handlers have not stopped.
--
-- Jobs whose lease ended more than a minute ago are not read. Claims end them, and during a long
-- transaction the dead entries of all jobs that have run since its begin are there. The type is one
-- of an array and not equal to a value: otherwise it would not count for the order, and without
-- sorts, which callers disable, only an index in this order is read.
BEGIN
    RETURN (SELECT count(*) FROM (
            SELECT FROM job
            WHERE job.status = 'running' AND job.type = ANY (ARRAY[name])
              AND job.lease_expires_at > at - interval '1 minute'
            ORDER BY job.type, job.lease_expires_at) AS running)
        -- Not a join: without statistics its plan reads all jobs of the type.
        + (SELECT count(*) FROM job_attempt
           WHERE job_attempt.held_until > at AND job_attempt.finished_at IS NOT NULL
             AND name = (SELECT job.type FROM job WHERE job.id = job_attempt.job_id));
END $$;
