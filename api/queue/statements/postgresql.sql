-- The statements of the queue on PostgreSQL, each with its name and its purpose. Ordinary reads are
-- queries in store.py.
--
-- Statements that change jobs call functions of the migrations, so that each is one statement
-- in autocommit and a client that freezes holds no lock. `job_small` and postgresql.py bound the
-- documents that they return, for the same reason. `:keep` stores the events of the transaction instead of sending
-- them in the notification.

-- name: insert
-- Store new jobs. Leave out jobs whose key exists or is being inserted by another transaction.
SELECT job_id AS id, job_created_at AS created_at, job_next_run_at AS next_run_at
FROM job_registry.job_insert(
    CAST(:jobs AS jsonb), CAST(:process AS text), CAST(:keep AS boolean), CAST(:wait AS boolean))

-- name: insert_unkeyed
-- Store new jobs without idempotency keys, so that nothing can conflict, and announce them.
-- `:message` has their events. If it is long, it is stored as a batch, and the notification names
-- the batch, as `job_announce` does. Most jobs of a bulk differ only in their ids and payloads, so
-- what else they have is sent once for each `kind`. Arrays take less time on both sides than a JSON
-- text, and hardly more than COPY, which would need a transaction. Those of other types than text
-- are sent as texts: the driver would query the catalog for each type on each connection. The times
-- are an array of texts, because some are null: a text has no nulls where `array_nulls` is off.
WITH common AS MATERIALIZED (
    SELECT clock_timestamp() AS now, CAST(:type AS text[]) AS type,
        CAST(:fingerprint AS text[]) AS fingerprint,
        CAST(CAST(:priority AS text) AS smallint[]) AS priority,
        CAST(CAST(:max_attempts AS text) AS integer[]) AS max_attempts,
        CAST(CAST(:timeout_seconds AS text) AS integer[]) AS timeout_seconds,
        CAST(CAST(:backoff_base_seconds AS text) AS double precision[]) AS base,
        CAST(CAST(:backoff_cap_seconds AS text) AS double precision[]) AS cap,
        CAST(:created_by AS text[]) AS created_by, CAST(:traceparent AS text[]) AS traceparent
), made AS (
    INSERT INTO job_registry.job (
        id, type, fingerprint, status, payload, priority, attempt, max_attempts, timeout_seconds,
        backoff_base_seconds, backoff_cap_seconds, created_by, traceparent, created_at, next_run_at)
    SELECT new.id, common.type[kind], common.fingerprint[kind], 'queued',
        CAST(new.payload AS jsonb), common.priority[kind], 0, common.max_attempts[kind],
        common.timeout_seconds[kind], common.base[kind], common.cap[kind], common.created_by[kind],
        common.traceparent[kind], common.now, coalesce(new.next_run_at, common.now)
    FROM common CROSS JOIN unnest(
        CAST(CAST(:ids AS text) AS uuid[]), CAST(:payloads AS text[]),
        CAST(CAST(:times AS text[]) AS timestamptz[]), CAST(CAST(:kinds AS text) AS integer[])
    ) AS new (id, payload, next_run_at, kind)
), batch AS (
    INSERT INTO job_registry.job_event_batch (message, created_at)
    SELECT CAST(:message AS text), common.now FROM common WHERE CAST(:is_batch AS boolean)
    RETURNING id
)
SELECT common.now, pg_notify(CAST(:channel AS text), CASE
    WHEN batch.id IS NULL THEN CAST(:message AS text)
    ELSE CAST(jsonb_build_object('process', CAST(:process AS text), 'batch', batch.id) AS text) END)
FROM common LEFT JOIN batch ON true

-- name: claim
-- Lease due jobs, and end the attempts whose lease has expired.
SELECT * FROM job_registry.job_claim(
    CAST(:wanted AS jsonb), CAST(:most AS integer), CAST(:worker AS text),
    CAST(:lease AS double precision), CAST(:process AS text), CAST(:keep AS boolean),
    CAST(:look_back AS double precision), CAST(:timed_out AS text), CAST(:lost AS text))

-- name: recover
-- End the attempts whose lease has expired.
SELECT * FROM job_registry.job_recover(
    CAST(:process AS text), CAST(:keep AS boolean), CAST(:most AS integer), NULL,
    CAST(:lease AS double precision), CAST(:timed_out AS text), CAST(:lost AS text))

-- name: set_due
-- Make jobs due that were stored as due at a time that is now in the future, because the clock has
-- stepped back, and return their ids. They are among the newest of the queued jobs. A call begins
-- below the jobs of the one before: to read those again would take longer each time.
UPDATE job_registry.job SET next_run_at = clock_timestamp() WHERE id = ANY (ARRAY(
    SELECT id FROM job_registry.job
    WHERE status = ANY (ARRAY['queued']) AND id < CAST(:below AS uuid)
        AND next_run_at = created_at AND created_at >
            statement_timestamp() + make_interval(secs => CAST(:slack AS double precision))
    ORDER BY status DESC, id DESC LIMIT :jobs FOR UPDATE SKIP LOCKED))
RETURNING id

-- name: end
-- End attempts as reported by their workers.
SELECT * FROM job_registry.job_end(
    CAST(:reports AS jsonb), CAST(:process AS text), CAST(:keep AS boolean))

-- name: succeed
-- End attempts as succeeded, and return only what events and metrics need of the jobs.
SELECT id, type, status, attempt, next_run_at FROM job_registry.job_succeed(
    CAST(:reports AS jsonb), CAST(:process AS text), CAST(:keep AS boolean))

-- name: succeed_and_claim
-- Do what `succeed` does, then what `claim` does. The attempts are ended first, so that their places
-- in the concurrency limits are free; in another order, fewer jobs would be claimed.
SELECT true AS is_report, ended.* FROM job_registry.job_succeed(
    CAST(:reports AS jsonb), CAST(:reporter AS text), CAST(:keep AS boolean)) AS ended
UNION ALL
SELECT false, claimed.* FROM job_registry.job_claim(
    CAST(:wanted AS jsonb), CAST(:most AS integer), CAST(:worker AS text),
    CAST(:lease AS double precision), CAST(:process AS text), CAST(:keep AS boolean),
    CAST(:look_back AS double precision), CAST(:timed_out AS text), CAST(:lost AS text)) AS claimed

-- name: unanswered
-- Return the leases of a worker that are older than the answer to its claim can be.
SELECT id, lease_token FROM job_registry.job
WHERE status = 'running' AND worker_id = CAST(:worker AS text)
  AND started_at < clock_timestamp() - make_interval(secs => CAST(:seconds AS double precision))

-- name: renew
-- Renew leases, and the places of timed-out attempts.
SELECT * FROM job_registry.job_renew(
    CAST(:renewals AS jsonb), CAST(:lease AS double precision), CAST(:process AS text),
    CAST(:keep AS boolean))

-- name: store_logs
-- Replace the log lines of attempts.
SELECT job_registry.job_store_logs(CAST(:kept AS jsonb), CAST(:process AS text), CAST(:keep AS boolean))

-- name: settle
-- Free the places of timed-out attempts.
SELECT job_registry.job_settle(CAST(:ended AS jsonb), CAST(:process AS text), CAST(:keep AS boolean))

-- name: cancel
-- Cancel a queued job, or record that a running one must stop; if it is owned, one of this owner.
-- The creator of a job never changes.
SELECT small.* FROM job_registry.job
CROSS JOIN LATERAL job_registry.job_cancel(job.id, CAST(:process AS text), CAST(:keep AS boolean)) AS changed
CROSS JOIN LATERAL job_registry.job_small(changed) AS small
WHERE job.id = CAST(:id AS uuid) AND (NOT CAST(:owned AS boolean) OR job.created_by = CAST(:owner AS text))

-- name: retry
-- Queue a failed or cancelled job again; if it is owned, one of this owner.
SELECT small.* FROM job_registry.job
CROSS JOIN LATERAL job_registry.job_retry(job.id, CAST(:process AS text), CAST(:keep AS boolean)) AS changed
CROSS JOIN LATERAL job_registry.job_small(changed) AS small
WHERE job.id = CAST(:id AS uuid) AND (NOT CAST(:owned AS boolean) OR job.created_by = CAST(:owner AS text))

-- name: next_due
-- Return the seconds until a claim may find more jobs.
SELECT job_registry.job_next_due(CAST(:wanted AS jsonb))

-- name: see_worker
-- Record that a worker runs these types, and these fingerprints of types. The order is fixed, so
-- that two transactions cannot deadlock.
WITH versions AS (
    INSERT INTO job_registry.job_type_version (type, fingerprint, worker_seen_at)
    SELECT seen.type, seen.fingerprint, clock_timestamp()
    FROM jsonb_to_recordset(CAST(:versions AS jsonb)) AS seen (type text, fingerprint text)
    ORDER BY seen.type, seen.fingerprint
    ON CONFLICT (type, fingerprint) DO UPDATE SET worker_seen_at = excluded.worker_seen_at)
INSERT INTO job_registry.job_type_state (type, worker_seen_at)
SELECT seen.type, clock_timestamp()
FROM jsonb_array_elements_text(CAST(:types AS jsonb)) AS seen (type)
ORDER BY seen.type
ON CONFLICT (type) DO UPDATE SET worker_seen_at = excluded.worker_seen_at

-- name: park
-- End attempts whose worker cannot read the payload, and park their jobs.
SELECT * FROM job_registry.job_park(
    CAST(:parks AS jsonb), CAST(:process AS text), CAST(:keep AS boolean))

-- name: unpark
-- Make jobs of these types that were parked by a time due for every worker.
SELECT * FROM job_registry.job_unpark(
    CAST(:types AS jsonb), CAST(:parked_until AS timestamptz), CAST(:most AS integer),
    CAST(:process AS text), CAST(:keep AS boolean))

-- name: fail_parked
-- Fail jobs that have been parked for too long.
SELECT * FROM job_registry.job_fail_parked(
    CAST(:older_than AS double precision), CAST(:most AS integer), CAST(:process AS text),
    CAST(:keep AS boolean))

-- name: prune_versions
-- Delete the versions of types whose workers were last seen long ago.
DELETE FROM job_registry.job_type_version WHERE worker_seen_at <
    statement_timestamp() - make_interval(secs => CAST(:keep_seconds AS double precision))
RETURNING type

-- name: versions
-- Return how many jobs of a type, up to a number, were admitted under each fingerprint, and when a
-- worker of it was last seen. A claim's own index gives the queued jobs that run first.
SELECT counted.fingerprint, sum(counted.queued)::bigint AS queued,
    sum(counted.running)::bigint AS running, sum(counted.parked)::bigint AS parked,
    sum(counted.refused)::bigint AS refused, max(counted.seen) AS worker_seen_at
FROM (
    SELECT fingerprint, count(*) AS queued, 0 AS running, 0 AS parked, 0 AS refused,
        CAST(NULL AS timestamptz) AS seen
    FROM (
        SELECT job.fingerprint FROM job_registry.job
        WHERE job.status = 'queued' AND job.type = :type
            AND job.next_run_at < '9999-01-01 00:00:00+00'
        ORDER BY job.priority DESC, job.next_run_at, job.id LIMIT :most) AS first
    GROUP BY fingerprint
    UNION ALL
    SELECT fingerprint, 0, count(*), 0, 0, NULL
    FROM (
        SELECT job.fingerprint FROM job_registry.job
        WHERE job.status = 'running' AND job.type = :type LIMIT :most) AS first
    GROUP BY fingerprint
    UNION ALL
    SELECT fingerprint, 0, 0, count(*), 0, NULL
    FROM (
        SELECT job_parked.fingerprint FROM job_registry.job_parked
        WHERE job_parked.parked_at IS NOT NULL AND job_parked.type = :type LIMIT :most) AS first
    GROUP BY fingerprint
    UNION ALL
    SELECT refuser.fingerprint, 0, 0, 0, count(*), NULL
    FROM (
        SELECT job_parked.refused_by FROM job_registry.job_parked
        WHERE job_parked.parked_at IS NOT NULL AND job_parked.type = :type LIMIT :most) AS first
    CROSS JOIN LATERAL unnest(string_to_array(first.refused_by, ',')) AS refuser (fingerprint)
    GROUP BY refuser.fingerprint
    UNION ALL
    SELECT fingerprint, 0, 0, 0, 0, worker_seen_at FROM job_registry.job_type_version
    WHERE type = :type
) AS counted
GROUP BY counted.fingerprint

-- name: announce_waits_ended
-- Announce that waits end. The event is of no job.
SELECT job_registry.job_announce(
    CAST(:process AS text),
    job_registry.job_event(
        'worker.stopped_waiting', '00000000-0000-0000-0000-000000000000', CAST(:waits AS text), 0),
    CAST(:keep AS boolean))

-- name: by_key
-- Return the jobs with these idempotency keys.
SELECT job.* FROM jsonb_to_recordset(CAST(:keys AS jsonb)) AS wanted (type text, key text)
JOIN job_registry.job ON job.type = wanted.type AND job.idempotency_key = wanted.key

-- name: holders
-- Return the jobs that have the idempotency keys of new ones, without their JSON values, and
-- whether their payloads are equal.
SELECT wanted.new_id, job.payload = CAST(wanted.payload AS jsonb) AS is_same,
    job.id, job.type, job.fingerprint, job.status, NULL AS payload, job.priority, job.attempt,
    job.max_attempts, job.timeout_seconds, job.created_at, job.idempotency_key, job.created_by,
    job.next_run_at, job.started_at, job.finished_at, job.cancel_requested_at, job.worker_id,
    NULL AS progress, NULL AS result, NULL AS error
FROM jsonb_to_recordset(CAST(:wanted AS jsonb)) AS wanted (
    new_id uuid, type text, key text, payload text)
JOIN job_registry.job ON job.type = wanted.type AND job.idempotency_key = wanted.key

-- name: newest
-- Return the ids of the newest jobs of several types and statuses. The newest of each pair are read
-- from its index, and merged: no index has them in one order. The type is one of an array and not
-- equal to a value: otherwise it would not count for the order, and the index of ids or that of a
-- status could be read in search of a rare pair. As a comparison of rows, the range of ids would not
-- end the search (PostgreSQL 17 and older). It runs with sorts disabled: see `Database.reading`.
SELECT newest.id FROM jsonb_to_recordset(CAST(:pairs AS jsonb)) AS pair (type text, status text)
CROSS JOIN LATERAL (
    SELECT job.id FROM job_registry.job
    WHERE job.type = ANY (ARRAY[pair.type]) AND job.status = pair.status
        AND job.id > CAST(:newer_than AS uuid) AND job.id < CAST(:older_than AS uuid)
        AND job.created_at >= CAST(:created_after AS timestamptz)
        AND job.created_at < CAST(:created_before AS timestamptz)
    ORDER BY job.type DESC, job.id DESC LIMIT :most
) AS newest
ORDER BY newest.id DESC LIMIT :most

-- name: oldest
-- The ids of the oldest jobs of several types and statuses, as `newest` reads the newest.
SELECT oldest.id FROM jsonb_to_recordset(CAST(:pairs AS jsonb)) AS pair (type text, status text)
CROSS JOIN LATERAL (
    SELECT job.id FROM job_registry.job
    WHERE job.type = ANY (ARRAY[pair.type]) AND job.status = pair.status
        AND job.id > CAST(:newer_than AS uuid) AND job.id < CAST(:older_than AS uuid)
        AND job.created_at >= CAST(:created_after AS timestamptz)
        AND job.created_at < CAST(:created_before AS timestamptz)
    ORDER BY job.type, job.id LIMIT :most
) AS oldest
ORDER BY oldest.id LIMIT :most

-- name: lease_states
-- Return the states of leases: in force, job succeeded by this lease, or neither.
SELECT job.id,
    job.status = 'running' AND job.lease_token = lease.token
        AND (job.lease_expires_at > clock_timestamp()
             OR lease.late AND job.deadline_at <= clock_timestamp()) AS in_force,
    job.status = 'succeeded' AND job.lease_token = lease.token AS succeeded
FROM jsonb_to_recordset(CAST(:leases AS jsonb)) AS lease (id uuid, token text, late boolean)
JOIN job_registry.job ON job.id = lease.id

-- name: attempts
-- Return the latest attempts of these jobs up to a size, oldest first, and how many there are.
SELECT id AS attempt_id, job_id, attempt, worker_id, started_at, finished_at, outcome, error,
    attempts,
    held_until > clock_timestamp() AS still_running
FROM (
    SELECT id, job_id, attempt, worker_id, started_at, finished_at, outcome, error, held_until,
        count(*) OVER () AS attempts, row_number() OVER (ORDER BY id DESC) AS place,
        sum(200 + coalesce(49 * length(CAST(error AS text))
                           - 48 * length(replace(CAST(error AS text), ',', '')), 0))
            OVER (ORDER BY id DESC) AS bytes
    FROM job_registry.job_attempt
    WHERE job_id IN (
        SELECT CAST(wanted.id AS uuid)
        FROM jsonb_array_elements_text(CAST(:ids AS jsonb)) AS wanted (id))
) AS sized
WHERE bytes <= CAST(:max_bytes AS bigint) OR place = 1
ORDER BY id

-- name: logs
-- Return the log lines of attempts up to a size, and how many attempts have some.
SELECT id AS attempt_id, logs, logged FROM (
    SELECT id, logs, count(*) OVER () AS logged, row_number() OVER (ORDER BY id DESC) AS place,
        sum(octet_length(logs)) OVER (ORDER BY id DESC) AS bytes
    FROM job_registry.job_attempt
    WHERE logs IS NOT NULL AND id IN (
        SELECT CAST(wanted.id AS bigint)
        FROM jsonb_array_elements_text(CAST(:ids AS jsonb)) AS wanted (id))
) AS sized
WHERE bytes <= CAST(:max_bytes AS bigint) OR place = 1
ORDER BY id DESC

-- name: waiting
-- Return what queued jobs wait for.
SELECT * FROM job_registry.job_waiting(CAST(:ids AS jsonb), CAST(:most AS integer))

-- name: expired_leases
-- Return the running jobs whose lease has expired, and whether `job_running` counts them.
SELECT id, type, lease_expires_at,
    lease_expires_at > statement_timestamp() - interval '1 minute' AS is_counted
FROM job_registry.job
WHERE status = 'running' AND lease_expires_at <= statement_timestamp()
ORDER BY lease_expires_at LIMIT :most

-- name: used_places
-- Return the used places of the limits of some types: their running jobs, and their timed-out
-- attempts whose handlers have not stopped.
SELECT wanted.type, job_registry.job_running(wanted.type, clock_timestamp()) AS places
FROM jsonb_array_elements_text(CAST(:types AS jsonb)) AS wanted (type)

-- name: now
-- Return the time of the database.
SELECT clock_timestamp() AS now

-- name: unfinished
-- Return a page of queued and running jobs in the order of their ids, with the texts of their
-- payloads. The page ends with the payload that makes it `:characters` long.
WITH page AS (
    (SELECT id FROM job_registry.job
     WHERE status = ANY (ARRAY['queued']) AND id > CAST(:after AS uuid)
     ORDER BY status, id LIMIT CAST(:jobs AS integer))
    UNION ALL
    (SELECT id FROM job_registry.job
     WHERE status = ANY (ARRAY['running']) AND id > CAST(:after AS uuid)
     ORDER BY status, id LIMIT CAST(:jobs AS integer))
    ORDER BY id LIMIT CAST(:jobs AS integer)),
found AS MATERIALIZED (
    SELECT each.id, each.type, each.text
    FROM page CROSS JOIN LATERAL (
        SELECT job.id, job.type, CAST(job.payload AS text) AS text
        FROM job_registry.job WHERE job.id = page.id OFFSET 0) AS each),
counted AS (
    SELECT *, sum(length(text)) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) AS characters
    FROM found)
SELECT id, type, text FROM counted
WHERE characters - length(text) < CAST(:characters AS bigint) ORDER BY id

-- name: prune
-- Delete jobs that ended long ago, oldest first. Skip locked rows. `clock_timestamp` may change while
-- a statement runs, so that no index serves a comparison with it: every job would be read. It would
-- be in a join with the old ones, too: their ids are an array.
WITH pruned AS (
    DELETE FROM job_registry.job WHERE id = ANY (ARRAY(
        SELECT id FROM job_registry.job
        WHERE status = :status AND finished_at <
            statement_timestamp() - make_interval(secs => CAST(:keep_seconds AS double precision))
        ORDER BY finished_at LIMIT :jobs FOR UPDATE SKIP LOCKED))
    RETURNING id)
SELECT count(*) FROM pruned

-- name: fold_counts
-- Replace rows of `job_count` by their sums. Skip rows that another transaction is merging.
WITH taken AS (
    DELETE FROM job_registry.job_count WHERE id IN (
        SELECT id FROM job_registry.job_count ORDER BY id LIMIT :rows FOR UPDATE SKIP LOCKED)
    RETURNING type, status, jobs
), merged AS (
    INSERT INTO job_registry.job_count (type, status, jobs)
    SELECT type, status, sum(jobs) FROM taken GROUP BY type, status HAVING sum(jobs) <> 0)
SELECT count(*) FROM taken

-- name: events_after
-- Return the batches of events that follow one, in order.
SELECT id AS number, message FROM job_registry.job_event_batch
WHERE id > :after ORDER BY id LIMIT :most

-- name: last_event
-- Return the id of the newest stored batch.
SELECT coalesce(max(id), 0) FROM job_registry.job_event_batch

-- name: prune_events
-- Delete old batches of events.
WITH pruned AS (
    DELETE FROM job_registry.job_event_batch WHERE id IN (
        SELECT id FROM job_registry.job_event_batch
        WHERE created_at <
            statement_timestamp() - make_interval(secs => CAST(:keep_seconds AS double precision))
        ORDER BY id LIMIT :batches FOR UPDATE SKIP LOCKED)
    RETURNING id)
SELECT count(*) FROM pruned
