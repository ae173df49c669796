-- The statements of the queue on PostgreSQL, each with its name and its purpose. Ordinary reads are
-- queries in store.py.
--
-- Those that change jobs call the functions that migration 0002 made, so that each is one
-- statement in autocommit: a client that freezes holds no lock. `:keep` stores the events of the
-- transaction instead of sending them with the notification.

-- name: insert
-- Store new jobs. A job whose key is held, or being inserted by another, is not in the answer.
SELECT job_id AS id, job_created_at AS created_at, job_next_run_at AS next_run_at
FROM job_registry.job_insert(
    CAST(:jobs AS jsonb), CAST(:process AS text), CAST(:keep AS boolean), CAST(:wait AS boolean))

-- name: claim
-- Lease due jobs, and end the attempts whose lease has run out.
SELECT * FROM job_registry.job_claim(
    CAST(:wanted AS jsonb), CAST(:most AS integer), CAST(:worker AS text),
    CAST(:lease AS double precision), CAST(:process AS text), CAST(:keep AS boolean),
    CAST(:look_back AS double precision), CAST(:timed_out AS text), CAST(:lost AS text))

-- name: recover
-- End the attempts whose lease has run out.
SELECT * FROM job_registry.job_recover(
    CAST(:process AS text), CAST(:keep AS boolean), CAST(:most AS integer), NULL,
    CAST(:lease AS double precision), CAST(:timed_out AS text), CAST(:lost AS text))

-- name: end
-- End attempts as their workers report.
SELECT * FROM job_registry.job_end(
    CAST(:reports AS jsonb), CAST(:process AS text), CAST(:keep AS boolean))

-- name: renew
-- Renew leases, and the places of attempts that have timed out.
SELECT * FROM job_registry.job_renew(
    CAST(:renewals AS jsonb), CAST(:lease AS double precision), CAST(:process AS text),
    CAST(:keep AS boolean))

-- name: settle
-- Free the places that timed-out attempts held.
SELECT job_registry.job_settle(CAST(:ended AS jsonb), CAST(:process AS text), CAST(:keep AS boolean))

-- name: cancel
-- Cancel a queued job, or note that a running one is to stop.
SELECT * FROM job_registry.job_cancel(CAST(:id AS uuid), CAST(:process AS text), CAST(:keep AS boolean))

-- name: retry
-- Queue a failed or cancelled job again.
SELECT * FROM job_registry.job_retry(CAST(:id AS uuid), CAST(:process AS text), CAST(:keep AS boolean))

-- name: next_due
-- Seconds until a claim may find more than now.
SELECT job_registry.job_next_due(CAST(:wanted AS jsonb))

-- name: see_worker
-- Note that a worker asks for these types. In one order, so that two cannot wait for each other.
INSERT INTO job_registry.job_type_state (type, worker_seen_at)
SELECT seen.type, clock_timestamp()
FROM jsonb_array_elements_text(CAST(:types AS jsonb)) AS seen (type)
ORDER BY seen.type
ON CONFLICT (type) DO UPDATE SET worker_seen_at = excluded.worker_seen_at

-- name: by_key
-- The jobs that hold these idempotency keys.
SELECT job.* FROM jsonb_to_recordset(CAST(:keys AS jsonb)) AS wanted (type text, key text)
JOIN job_registry.job ON job.type = wanted.type AND job.idempotency_key = wanted.key

-- name: newest
-- The newest jobs of several types and statuses. Of each pair the newest are read from its index,
-- and merged: no index has them in one order. The status is a range, and not an equality, so that
-- only the index of type, status and id has the order: that of type and id would read every job
-- of a type in search of a rare status.
SELECT job.* FROM job_registry.job WHERE job.id IN (
    SELECT newest.id FROM jsonb_to_recordset(CAST(:pairs AS jsonb)) AS pair (type text, status text)
    CROSS JOIN LATERAL (
        SELECT job.id FROM job_registry.job
        WHERE job.type = pair.type AND job.status >= pair.status
            AND (job.status, job.id) < (pair.status, CAST(:after AS uuid))
        ORDER BY job.status DESC, job.id DESC LIMIT :first
    ) AS newest
    ORDER BY newest.id DESC LIMIT :first)
ORDER BY job.id DESC

-- name: lease_states
-- What has become of leases: still in force, succeeded by that very lease, or neither.
SELECT job.id,
    job.status = 'running' AND job.lease_token = lease.token
        AND (job.lease_expires_at > clock_timestamp()
             OR lease.late AND job.deadline_at <= clock_timestamp()) AS in_force,
    job.status = 'succeeded' AND job.lease_token = lease.token AS succeeded
FROM jsonb_to_recordset(CAST(:leases AS jsonb)) AS lease (id uuid, token text, late boolean)
JOIN job_registry.job ON job.id = lease.id

-- name: attempts
-- Every attempt of these jobs, the first one first.
SELECT job_id, attempt, worker_id, started_at, finished_at, outcome, error,
    finished_at IS NOT NULL AND held_until IS NOT NULL AND held_until > clock_timestamp()
        AS still_running
FROM job_registry.job_attempt
WHERE job_id IN (
    SELECT CAST(wanted.id AS uuid)
    FROM jsonb_array_elements_text(CAST(:ids AS jsonb)) AS wanted (id))
ORDER BY id

-- name: waiting
-- What queued jobs wait for.
SELECT * FROM job_registry.job_waiting(CAST(:ids AS jsonb), CAST(:most AS integer))

-- name: now
-- The database's time.
SELECT clock_timestamp() AS now

-- name: prune
-- Delete jobs that ended long ago, the oldest first. Rows that are locked are left for later.
WITH pruned AS (
    DELETE FROM job_registry.job WHERE id IN (
        SELECT id FROM job_registry.job
        WHERE status = :status AND finished_at <
            clock_timestamp() - make_interval(secs => CAST(:keep_seconds AS double precision))
        ORDER BY finished_at LIMIT :jobs FOR UPDATE SKIP LOCKED)
    RETURNING id)
SELECT count(*) FROM pruned

-- name: fold_counts
-- Replace rows of `job_count` by their sums. Rows that another is folding stay.
WITH taken AS (
    DELETE FROM job_registry.job_count WHERE id IN (
        SELECT id FROM job_registry.job_count ORDER BY id LIMIT :rows FOR UPDATE SKIP LOCKED)
    RETURNING type, status, jobs)
INSERT INTO job_registry.job_count (type, status, jobs)
SELECT type, status, sum(jobs) FROM taken GROUP BY type, status HAVING sum(jobs) <> 0

-- name: last_event
-- The number of the newest stored batch.
SELECT coalesce(max(id), 0) FROM job_registry.job_event_batch

-- name: prune_events
-- Delete stored batches that every process has had time to read.
WITH pruned AS (
    DELETE FROM job_registry.job_event_batch WHERE id IN (
        SELECT id FROM job_registry.job_event_batch
        WHERE created_at <
            clock_timestamp() - make_interval(secs => CAST(:keep_seconds AS double precision))
        ORDER BY id LIMIT :batches FOR UPDATE SKIP LOCKED)
    RETURNING id)
SELECT count(*) FROM pruned
