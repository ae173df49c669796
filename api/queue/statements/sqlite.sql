-- The statements of the queue on SQLite, each with its name and its purpose. Ordinary reads are
-- queries in store.py.
--
-- Statements that change jobs run in one BEGIN IMMEDIATE, which excludes every other writer, so rows
-- do not change between statements. `:now` is the time of the transaction, read from SQLite. `:shift`
-- moves that time: by nothing, except in a queue for tests, whose clock can be advanced.

-- name: now
-- Return the time of the database, in the form in which times are stored and compared.
SELECT strftime('%Y-%m-%d %H:%M:%f', 'now', :shift) || '000' AS now

-- name: insert
-- Store a new job, unless its type already has a job with the idempotency key.
INSERT INTO job (
    id, type, fingerprint, status, payload, priority, attempt, max_attempts, timeout_seconds,
    backoff_base_seconds, backoff_cap_seconds, idempotency_key, created_by, traceparent, created_at,
    next_run_at)
VALUES (
    :id, :type, :fingerprint, 'queued', :payload, :priority, 0, :max_attempts, :timeout_seconds,
    :backoff_base_seconds, :backoff_cap_seconds, :idempotency_key, :created_by, :traceparent, :now,
    coalesce(:next_run_at, :now))
ON CONFLICT (type, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING

-- name: found
-- Return which of these jobs are stored.
SELECT job.id FROM json_each(:ids) AS wanted CROSS JOIN job ON job.id = wanted.value

-- name: keep_events
-- Store the events of this transaction, for other processes to read.
INSERT INTO job_event_batch (message, created_at) VALUES (:message, :now)

-- name: expired
-- Return the attempts whose lease has expired.
SELECT id, lease_token, deadline_at <= :now AS timed_out FROM job
WHERE status = 'running' AND lease_expires_at <= :now ORDER BY lease_expires_at LIMIT :most

-- name: ahead
-- Return leases that end later than a lease can, because the clock has stepped back.
SELECT id, lease_seconds, timeout_seconds, deadline_at FROM job
WHERE status = 'running' AND lease_expires_at > :lease_end AND lease_seconds <= :lease
LIMIT :most

-- name: set_lease
-- Set the ends of a lease and of its attempt.
UPDATE job SET lease_expires_at = :lease_expires_at, held_until = :held_until,
    deadline_at = :deadline_at
WHERE id = :id

-- name: set_due
-- Make jobs due that were stored as due at a time that is now in the future, because the clock has
-- stepped back. Ids begin with the time, so only the end of the primary key is read.
UPDATE job SET next_run_at = :now
WHERE id IN (
    SELECT id FROM job WHERE id > :newest AND next_run_at = created_at AND created_at > :now
    LIMIT :most)

-- name: next_level
-- Return the highest priority below `:below` at which the type has a queued job, and its time.
SELECT priority, next_run_at FROM job
WHERE status = 'queued' AND type = :type AND priority < :below
ORDER BY priority DESC, next_run_at, id LIMIT 1

-- name: running
-- Count the running jobs of the type, and the places of its timed-out attempts.
SELECT (SELECT count(*) FROM job WHERE status = 'running' AND type = :type)
    + (SELECT count(*) FROM job_attempt CROSS JOIN job ON job.id = job_attempt.job_id
       WHERE job_attempt.held_until > :now AND job_attempt.finished_at IS NOT NULL
         AND job.type = :type)

-- name: due
-- Return the due jobs of a type and priority, oldest first, with their timeouts and
-- the sizes of their payloads.
SELECT id, timeout_seconds, length(payload) AS bytes FROM job
WHERE status = 'queued' AND type = :type AND priority = :priority AND next_run_at <= :now
ORDER BY next_run_at, id LIMIT :jobs

-- name: due_readable
-- The same, of jobs that were admitted under one of some fingerprints.
SELECT id, timeout_seconds, length(payload) AS bytes FROM job
WHERE status = 'queued' AND type = :type AND priority = :priority AND next_run_at <= :now
  AND fingerprint IN (SELECT value FROM json_each(:readable))
ORDER BY next_run_at, id LIMIT :jobs

-- name: any_parked
-- Return whether there are parked jobs.
SELECT 1 FROM job_parked WHERE parked_at IS NOT NULL LIMIT 1

-- name: next_refused
-- Return the next list of fingerprints that have refused parked jobs of the type.
SELECT refused_by FROM job_parked
WHERE parked_at IS NOT NULL AND type = :type AND refused_by > :refused
ORDER BY refused_by LIMIT 1

-- name: next_parked_level
-- Return the highest priority below `:below` of the jobs of a type that these fingerprints refused,
-- and the time of its oldest job.
SELECT priority, due_at FROM job_parked
WHERE parked_at IS NOT NULL AND type = :type AND refused_by = :refused AND priority < :below
ORDER BY priority DESC, due_at LIMIT 1

-- name: due_parked
-- Return the parked jobs of a type and priority that these fingerprints refused, oldest first.
SELECT job.id, job.timeout_seconds, length(job.payload) AS bytes FROM (
    SELECT job_id, due_at FROM job_parked
    WHERE parked_at IS NOT NULL AND type = :type AND refused_by = :refused
      AND priority = :priority
      AND (:readable IS NULL OR fingerprint IN (SELECT value FROM json_each(:readable)))
    ORDER BY due_at, job_id LIMIT :jobs) AS parked
CROSS JOIN job ON job.id = parked.job_id AND job.status = 'queued'

-- name: refused_by
-- Return the fingerprints that have refused a job.
SELECT refused_by FROM job_parked WHERE job_id = :id

-- name: park
-- Record that a worker refused a job.
INSERT INTO job_parked (
    job_id, type, priority, fingerprint, due_at, parked_at, refused_by, error)
SELECT id, type, priority, fingerprint, :due_at, :now, :refused_by, :error FROM job WHERE id = :id
ON CONFLICT (job_id) DO UPDATE SET
    parked_at = excluded.parked_at, refused_by = excluded.refused_by, error = excluded.error

-- name: parked_of
-- Return jobs of a type that were parked by a time.
SELECT job_id, due_at FROM job_parked
WHERE parked_at IS NOT NULL AND type = :type AND parked_at <= :parked_until LIMIT :jobs

-- name: unpark
-- Make a parked job due for every worker. A parked job is queued, because a trigger removes the mark
-- when that changes.
UPDATE job SET next_run_at = :due_at WHERE id = :id RETURNING *

-- name: forget_parked
-- Forget which workers refused a job.
DELETE FROM job_parked WHERE job_id = :id

-- name: parked_before
-- Return jobs that were parked before a time, the oldest first.
SELECT job_id, error FROM job_parked WHERE parked_at < :before ORDER BY parked_at LIMIT :jobs

-- name: fail_parked
-- Fail a parked job, which is queued.
UPDATE job SET status = 'failed', next_run_at = NULL, finished_at = :now, error = :error
WHERE id = :id RETURNING *

-- name: see_version
-- Record that a worker has a version of a type.
INSERT INTO job_type_version (type, fingerprint, worker_seen_at) VALUES (:type, :fingerprint, :now)
ON CONFLICT (type, fingerprint) DO UPDATE SET worker_seen_at = excluded.worker_seen_at

-- name: prune_versions
-- Delete the versions of types whose workers were last seen long ago.
DELETE FROM job_type_version WHERE worker_seen_at < :before

-- name: versions
-- Return how many jobs of a type, up to a number, were admitted under each fingerprint, and when a
-- worker of it was last seen. A claim's own index gives the queued jobs that run first. After ANALYZE,
-- if most jobs are of the type, SQLite would read them all: without `+`, by the times of the queued
-- ones, and to find running ones by more than their ids.
SELECT fingerprint, sum(queued) AS queued, sum(running) AS running, sum(parked) AS parked,
    sum(refused) AS refused, max(seen) AS worker_seen_at
FROM (
    SELECT fingerprint, count(*) AS queued, 0 AS running, 0 AS parked, 0 AS refused, NULL AS seen
    FROM (
        SELECT fingerprint FROM job WHERE status = 'queued' AND type = :type
            AND +next_run_at < '9999-01-01 00:00:00.000000'
        ORDER BY priority DESC, next_run_at, id LIMIT :most)
    GROUP BY fingerprint
    UNION ALL
    SELECT fingerprint, 0, count(*), 0, 0, NULL
    FROM (
        SELECT fingerprint FROM job WHERE id IN (
            SELECT id FROM job WHERE status = 'running' AND type = :type LIMIT :most))
    GROUP BY fingerprint
    UNION ALL
    SELECT fingerprint, 0, 0, count(*), 0, NULL
    FROM (
        SELECT fingerprint FROM job_parked
        WHERE parked_at IS NOT NULL AND type = :type LIMIT :most)
    GROUP BY fingerprint
    UNION ALL
    SELECT refuser.value, 0, 0, 0, count(*), NULL
    FROM (
        SELECT refused_by FROM job_parked
        WHERE parked_at IS NOT NULL AND type = :type LIMIT :most) AS first
    CROSS JOIN json_each('["' || replace(first.refused_by, ',', '","') || '"]') AS refuser
    GROUP BY refuser.value
    UNION ALL
    SELECT fingerprint, 0, 0, 0, 0, worker_seen_at FROM job_type_version WHERE type = :type)
GROUP BY fingerprint

-- name: lease
-- Lease jobs.
UPDATE job SET
    status = 'running', attempt = attempt + 1, next_run_at = NULL, started_at = :now,
    worker_id = :worker, progress = NULL, lease_token = lease.token, lease_seconds = :lease,
    held_until = :held_until, deadline_at = lease.deadline_at,
    lease_expires_at = lease.lease_expires_at
FROM (
    SELECT json_extract(value, '$.id') AS job_id, json_extract(value, '$.token') AS token,
        json_extract(value, '$.deadline_at') AS deadline_at,
        json_extract(value, '$.lease_expires_at') AS lease_expires_at
    FROM json_each(:leases)) AS lease
WHERE job.id = lease.job_id
RETURNING *

-- name: open_attempts
-- Store the attempts of leases.
INSERT INTO job_attempt (job_id, attempt, worker_id, started_at, lease_token)
SELECT job.id, job.attempt, job.worker_id, job.started_at, job.lease_token
FROM json_each(:ids) AS leased CROSS JOIN job ON job.id = leased.value

-- name: open_attempt
-- Store an attempt, to check that it can be written.
INSERT INTO job_attempt (job_id, attempt, worker_id, started_at, lease_token)
VALUES (:id, 1, :worker, :now, '')

-- name: running_lease
-- Return the running job of a lease. `:late` accepts an expired lease: `timed_out` only past the
-- attempt's deadline, `lost` always.
SELECT * FROM job
WHERE id = :id AND lease_token = :token AND status = 'running'
  AND (lease_expires_at > :now OR :late = 'lost' OR :late = 'timed_out' AND deadline_at <= :now)

-- name: end
-- End a job's attempt.
UPDATE job SET
    status = :status, next_run_at = :next_run_at, finished_at = :finished_at, attempt = :attempt,
    returns = :returns, quick_returns = :quick_returns, result = :result, error = :error,
    lease_token = :lease_token, lease_expires_at = NULL, deadline_at = NULL, held_until = NULL
WHERE id = :id
RETURNING *

-- name: succeed
-- End attempts whose lease is in force as succeeded. With `+`, the jobs are found by their ids and
-- not by their status. For numbers, see `_text` in sqlite.py.
UPDATE job SET
    status = 'succeeded', finished_at = :now, quick_returns = 0,
    result = CASE WHEN lease.result GLOB '[-0-9]*[.e]*' THEN CAST(lease.result AS blob)
        ELSE lease.result END,
    error = NULL, lease_expires_at = NULL, deadline_at = NULL, held_until = NULL
FROM (
    SELECT json_extract(value, '$.id') AS job_id, json_extract(value, '$.token') AS token,
        json_extract(value, '$.result') AS result
    FROM json_each(:leases)) AS lease
WHERE job.id = lease.job_id AND job.lease_token = lease.token
  AND +job.status = 'running' AND +job.lease_expires_at > :now
RETURNING id, type, status, attempt, next_run_at, returns

-- name: close_succeeded
-- Store the outcome of attempts that have succeeded.
UPDATE job_attempt
SET finished_at = :now, outcome = 'succeeded'
WHERE job_id IN (SELECT value FROM json_each(:ids)) AND finished_at IS NULL

-- name: close_attempt
-- Store the outcome of an attempt.
UPDATE job_attempt
SET finished_at = :now, outcome = :outcome, error = :error, held_until = :held_until
WHERE job_id = :id AND finished_at IS NULL

-- name: forget_returned
-- Delete the oldest attempts of a job that were given back or cancelled, and keep 32.
DELETE FROM job_attempt
WHERE job_id = :id AND outcome IN ('released', 'snoozed', 'cancelled') AND id <= (
    SELECT id FROM job_attempt WHERE job_id = :id AND outcome IN ('released', 'snoozed', 'cancelled')
    ORDER BY id DESC LIMIT 1 OFFSET 32)

-- name: forget_oldest
-- Delete the oldest attempts of a job, and keep 1,000: the most that a job has unless it is retried
-- after its end.
DELETE FROM job_attempt
WHERE job_id = :id AND id <= (
    SELECT id FROM job_attempt WHERE job_id = :id ORDER BY id DESC LIMIT 1 OFFSET 1000)

-- name: unanswered
-- Return the leases of a worker that are older than the answer to its claim can be.
SELECT id, lease_token FROM job
WHERE status = 'running' AND worker_id = :worker
  AND started_at < strftime('%Y-%m-%d %H:%M:%f', 'now', :shift, '-' || :seconds || ' seconds') || '000'

-- name: renew
-- Renew a lease.
UPDATE job SET
    lease_expires_at = :lease_expires_at, held_until = :held_until, lease_seconds = :lease,
    progress = coalesce(:progress, progress)
WHERE id = :id

-- name: hold
-- Renew the place of a timed-out attempt.
UPDATE job_attempt SET held_until = :held_until
WHERE job_id = :id AND lease_token = :token AND held_until IS NOT NULL

-- name: store_logs
-- Replace the log lines of an attempt.
UPDATE job_attempt SET logs = :lines WHERE job_id = :id AND lease_token = :token

-- name: settle
-- Free the place of a timed-out attempt. The type is that of `:id`: in RETURNING, SQLite would find
-- `job_attempt.job_id` by reading all jobs.
UPDATE job_attempt SET held_until = NULL
WHERE job_id = :id AND lease_token = :token AND held_until IS NOT NULL
RETURNING attempt, (SELECT type FROM job WHERE id = :id) AS type

-- name: cancel
-- Cancel a queued job, or record that a running one must stop; if it is owned, one of this owner.
UPDATE job SET
    status = CASE status WHEN 'queued' THEN 'cancelled' ELSE status END,
    finished_at = CASE status WHEN 'queued' THEN :now END,
    next_run_at = NULL,
    cancel_requested_at = coalesce(cancel_requested_at, :now)
WHERE id = :id AND status IN ('queued', 'running') AND (NOT :owned OR created_by = :owner)
RETURNING *

-- name: retry
-- Queue a failed or cancelled job; if it is owned, one of this owner. If no attempt is left, allow
-- one more.
UPDATE job SET
    status = 'queued', next_run_at = :now, finished_at = NULL, cancel_requested_at = NULL,
    lease_token = NULL, progress = NULL, quick_returns = 0,
    max_attempts = max(max_attempts, attempt + 1)
WHERE id = :id AND status IN ('failed', 'cancelled') AND (NOT :owned OR created_by = :owner)
RETURNING *

-- name: next_end
-- Return when the next lease, or the next place of a timed-out attempt, expires.
SELECT min(ends) FROM (
    SELECT min(lease_expires_at) AS ends FROM job WHERE status = 'running'
    UNION ALL
    SELECT min(held_until) FROM job_attempt
    WHERE held_until > :now AND finished_at IS NOT NULL)

-- name: see_worker
-- Record that a worker runs a type.
INSERT INTO job_type_state (type, worker_seen_at) VALUES (:type, :now)
ON CONFLICT (type) DO UPDATE SET worker_seen_at = excluded.worker_seen_at

-- name: by_key
-- Return the jobs with these idempotency keys.
SELECT job.* FROM json_each(:keys) AS wanted
CROSS JOIN job ON job.type = json_extract(wanted.value, '$.type')
    AND job.idempotency_key = json_extract(wanted.value, '$.key')

-- name: holder
-- Return the job that has the idempotency key of a new one, without its JSON values, and whether
-- the text of its payload is the same.
SELECT id, type, fingerprint, status, NULL AS payload, priority, attempt, max_attempts,
    timeout_seconds, created_at, idempotency_key, created_by, next_run_at, started_at, finished_at,
    cancel_requested_at, worker_id, NULL AS progress, NULL AS result, NULL AS error,
    payload = :payload AS is_same, length(payload) AS payload_length
FROM job WHERE type = :type AND idempotency_key = :key

-- name: payload
-- Return the payload of a job.
SELECT payload FROM job WHERE id = :id

-- name: newest
-- Return the ids of the newest jobs of several types and statuses. The newest of each pair are read
-- from its index, and merged: no index has them in one order. The index is named, because SQLite 3.53
-- reads that of statuses, which has the jobs of all types.
SELECT job.id FROM json_each(:pairs) AS pair CROSS JOIN job ON job.id IN (
    SELECT newest.id FROM job AS newest INDEXED BY job_by_type_and_status
    WHERE newest.type = json_extract(pair.value, '$.type')
        AND newest.status = json_extract(pair.value, '$.status')
        AND newest.id < :older_than AND newest.id > :newer_than
        AND newest.created_at >= :created_after AND newest.created_at < :created_before
    ORDER BY newest.id DESC LIMIT :most)
ORDER BY job.id DESC LIMIT :most

-- name: oldest
-- The ids of the oldest jobs of several types and statuses, as `newest` reads the newest.
SELECT job.id FROM json_each(:pairs) AS pair CROSS JOIN job ON job.id IN (
    SELECT oldest.id FROM job AS oldest INDEXED BY job_by_type_and_status
    WHERE oldest.type = json_extract(pair.value, '$.type')
        AND oldest.status = json_extract(pair.value, '$.status')
        AND oldest.id < :older_than AND oldest.id > :newer_than
        AND oldest.created_at >= :created_after AND oldest.created_at < :created_before
    ORDER BY oldest.id LIMIT :most)
ORDER BY job.id LIMIT :most

-- name: lease_states
-- Return whether jobs succeeded by these leases. None of them is in force: a report under such a
-- lease ends the attempt, and no other transaction can have locked the job.
SELECT job.id, 0 AS in_force,
    job.status = 'succeeded' AND job.lease_token = json_extract(lease.value, '$.token')
        AS succeeded
FROM json_each(:leases) AS lease
CROSS JOIN job ON job.id = json_extract(lease.value, '$.id')

-- name: attempts
-- Return the latest attempts of these jobs up to a size, oldest first, and how many there are.
SELECT id AS attempt_id, job_id, attempt, worker_id, started_at, finished_at, outcome, error,
    attempts,
    held_until > strftime('%Y-%m-%d %H:%M:%f', 'now', :shift) || '000' AS still_running
FROM (
    SELECT id, job_id, attempt, worker_id, started_at, finished_at, outcome, error, held_until,
        count(*) OVER () AS attempts, row_number() OVER (ORDER BY id DESC) AS place,
        sum(200 + coalesce(49 * length(error) - 48 * length(replace(error, ',', '')), 0))
            OVER (ORDER BY id DESC) AS bytes
    FROM job_attempt WHERE job_id IN (SELECT value FROM json_each(:ids)))
WHERE bytes <= :max_bytes OR place = 1
ORDER BY id

-- name: logs
-- Return the log lines of attempts up to a size, and how many attempts have some.
SELECT id AS attempt_id, logs, logged FROM (
    SELECT id, logs, count(*) OVER () AS logged, row_number() OVER (ORDER BY id DESC) AS place,
        sum(length(CAST(logs AS BLOB))) OVER (ORDER BY id DESC) AS bytes
    FROM job_attempt
    WHERE logs IS NOT NULL AND id IN (SELECT value FROM json_each(:ids)))
WHERE bytes <= :max_bytes OR place = 1
ORDER BY id DESC

-- name: waiting
-- Return what queued jobs wait for. Each count reads one range of an index, up to a bound. Higher
-- priorities are read one by one, so that jobs that are scheduled for later are not read.
SELECT job.id,
    (julianday(job.next_run_at) - julianday('now', :shift)) * 86400.0 AS due_in_seconds,
    (SELECT count(*) FROM job AS other WHERE other.status = 'running' AND other.type = job.type)
        + (SELECT count(*) FROM job_attempt CROSS JOIN job AS held ON held.id = job_attempt.job_id
           WHERE job_attempt.held_until > strftime('%Y-%m-%d %H:%M:%f', 'now', :shift) || '000'
             AND job_attempt.finished_at IS NOT NULL AND held.type = job.type) AS running,
    (SELECT (julianday('now', :shift) - julianday(job_type_state.worker_seen_at)) * 86400.0
     FROM job_type_state WHERE job_type_state.type = job.type) AS worker_seen_seconds_ago,
    (WITH RECURSIVE level (priority) AS (
        SELECT (SELECT other.priority FROM job AS other
                WHERE other.status = 'queued' AND other.type = job.type
                  AND other.priority > job.priority
                ORDER BY other.priority DESC LIMIT 1)
        UNION ALL
        SELECT (SELECT other.priority FROM job AS other
                WHERE other.status = 'queued' AND other.type = job.type
                  AND other.priority > job.priority AND other.priority < level.priority
                ORDER BY other.priority DESC LIMIT 1)
        FROM level WHERE level.priority IS NOT NULL)
     SELECT coalesce(sum((SELECT count(*) FROM (
        SELECT 1 FROM job AS other
        WHERE other.status = 'queued' AND other.type = job.type
          AND other.priority = level.priority
          AND other.next_run_at <= strftime('%Y-%m-%d %H:%M:%f', 'now', :shift) || '000'
        LIMIT :most))), 0) FROM level
    ) + (SELECT count(*) FROM (
        SELECT 1 FROM job AS other
        WHERE other.status = 'queued' AND other.type = job.type
          AND other.priority = job.priority
          AND (other.next_run_at, other.id) < (job.next_run_at, job.id)
        LIMIT :most
    )) AS ahead
FROM job WHERE status = 'queued' AND id IN (SELECT value FROM json_each(:ids))

-- name: expired_leases
-- Return the running jobs whose lease has expired. `waiting` and `used_places` count all of them.
SELECT id, type, lease_expires_at, 1 AS is_counted FROM job
WHERE status = 'running'
  AND lease_expires_at <= strftime('%Y-%m-%d %H:%M:%f', 'now', :shift) || '000'
ORDER BY lease_expires_at LIMIT :most

-- name: used_places
-- Return the used places of the limits of some types: their running jobs, and their timed-out
-- attempts whose handlers have not stopped.
SELECT wanted.value AS type,
    (SELECT count(*) FROM job WHERE job.status = 'running' AND job.type = wanted.value)
        + (SELECT count(*) FROM job_attempt CROSS JOIN job AS held ON held.id = job_attempt.job_id
           WHERE job_attempt.held_until > strftime('%Y-%m-%d %H:%M:%f', 'now', :shift) || '000'
             AND job_attempt.finished_at IS NOT NULL AND held.type = wanted.value) AS places
FROM json_each(:types) AS wanted

-- name: unfinished
-- Return a page of queued and running jobs in the order of their ids, with the texts of their
-- payloads. The page ends with the payload that makes it `:characters` long.
WITH page (id) AS (
    SELECT id FROM (
        SELECT id FROM job WHERE status = 'queued' AND id > :after ORDER BY id LIMIT :jobs)
    UNION ALL
    SELECT id FROM (
        SELECT id FROM job WHERE status = 'running' AND id > :after ORDER BY id LIMIT :jobs)
    ORDER BY id LIMIT :jobs),
found AS MATERIALIZED (
    SELECT job.id, job.type, CAST(job.payload AS TEXT) AS text
    FROM page CROSS JOIN job ON job.id = page.id),
counted AS (
    SELECT *, sum(length(text)) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) AS characters
    FROM found)
SELECT id, type, text FROM counted WHERE characters - length(text) < :characters ORDER BY id

-- name: prune
-- Delete jobs that ended long ago, oldest first.
DELETE FROM job WHERE id IN (
    SELECT id FROM job WHERE status = :status AND finished_at < :before
    ORDER BY finished_at LIMIT :jobs)

-- name: fold_counts
-- Delete counts that are zero.
DELETE FROM job_count WHERE jobs = 0

-- name: events_after
-- Return the batches of events that follow one, in order.
SELECT id AS number, message FROM job_event_batch WHERE id > :after ORDER BY id LIMIT :most

-- name: last_event
-- Return the id of the newest batch, even if it was deleted.
SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'job_event_batch'), 0)

-- name: prune_events
-- Delete old batches of events.
DELETE FROM job_event_batch WHERE id IN (
    SELECT id FROM job_event_batch WHERE created_at < :before ORDER BY id LIMIT :batches)
