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
