CREATE FUNCTION job_recoverable(
    at timestamptz, look_back double precision, lease double precision) RETURNS boolean
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_sort = off SET jit = off AS $$
-- Return whether `job_recover` has anything to do: a lease has expired, or ends later than a lease
-- can.
--
-- Two indexes have the running jobs. Where the statistics are those of an idle queue, both seem to be
-- empty, and PostgreSQL may choose the one without the times, all of which it then reads: those of
-- every running job, and during a long transaction those of every job that has run since. Without
-- sorts, only the index in the order of the times is left.
BEGIN
    RETURN (
        SELECT job.lease_expires_at FROM job
        WHERE job.status = 'running' AND job.lease_expires_at <= at
          AND job.lease_expires_at >= coalesce(at - make_interval(secs => look_back), '-infinity')
        ORDER BY job.lease_expires_at LIMIT 1
    ) IS NOT NULL OR (
        SELECT job.lease_expires_at FROM job
        WHERE job.status = 'running' AND job.lease_expires_at > at + make_interval(secs => lease + 1)
        ORDER BY job.lease_expires_at LIMIT 1
    ) IS NOT NULL;
END $$;
