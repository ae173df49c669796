-- The operations that change jobs on PostgreSQL, each one statement for its client.
--
-- Each is a function, so that it is one transaction in autocommit: a client that freezes or loses
-- its connection holds no lock. Functions that clients call have the search path of their own
-- schema and use only index scans and nested loops: a plan that was made for a small table would be
-- kept while the table grows, and a wrong estimate would start the JIT compiler. Functions that
-- only these functions call run with their settings.

CREATE FUNCTION job_event(name text, id uuid, type text, attempt integer) RETURNS jsonb
LANGUAGE sql STABLE AS $$
-- Return an array of one event, in the form of event messages.
SELECT jsonb_build_array(
    jsonb_build_array(name, replace(CAST(id AS text), '-', ''), type, attempt))
$$;

CREATE FUNCTION job_announce(process text, events jsonb, keep boolean) RETURNS void
LANGUAGE plpgsql AS $$
-- Send events to other processes when this transaction commits. A notification is shorter than
-- 8,000 bytes. A longer message, or any message when `keep` is set, is stored as a batch. The
-- channel has the name of the schema, so that deployments in two schemas are separate.
DECLARE
    message text := jsonb_build_object('process', process, 'events', events)::text;
    batch bigint;
BEGIN
    IF keep OR octet_length(message) > 7900 THEN
        INSERT INTO job_event_batch (message, created_at) VALUES (message, clock_timestamp())
        RETURNING id INTO batch;
        message := jsonb_build_object('process', process, 'batch', batch)::text;
    END IF;
    PERFORM pg_notify(current_schema(), message);
END $$;

CREATE FUNCTION job_small(whole job) RETURNS job
LANGUAGE plpgsql AS $$
-- Return a job without documents over 8 kB, which are NULL; the client reads them later. It is for
-- statements that hold locks: a result that fits into the socket's buffer does not wait for a
-- client that has stopped reading.
BEGIN
    IF pg_column_size(whole.payload) > 8192 OR pg_column_size(whole.error) > 8192
        OR pg_column_size(whole.result) > 8192 OR pg_column_size(whole.progress) > 8192
        -- Those sizes are as stored. Compressed values are sent uncompressed.
        OR pg_column_compression(whole.payload) IS NOT NULL
            AND octet_length(CAST(whole.payload AS text)) > 8192
        OR pg_column_compression(whole.error) IS NOT NULL
            AND octet_length(CAST(whole.error AS text)) > 8192
        OR pg_column_compression(whole.result) IS NOT NULL
            AND octet_length(CAST(whole.result AS text)) > 8192
        OR pg_column_compression(whole.progress) IS NOT NULL
            AND octet_length(CAST(whole.progress AS text)) > 8192 THEN
        whole.payload := NULL;
        whole.error := NULL;
        whole.result := NULL;
        whole.progress := NULL;
    END IF;
    RETURN whole;
END $$;

CREATE FUNCTION job_key_locked(type text, key text, wait boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
-- Try to lock an idempotency key, and return whether that succeeded. With `wait`, wait for it.
DECLARE
    lock CONSTANT bigint := hashtextextended(
        'job key ' || to_regclass('job')::oid || ' ' || type || ' ' || key, 0);
BEGIN
    IF wait THEN
        PERFORM pg_advisory_xact_lock(lock);
        RETURN true;
    END IF;
    RETURN pg_try_advisory_xact_lock(lock);
END $$;

CREATE FUNCTION job_insert(jobs jsonb, process text, keep boolean, wait boolean)
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
    events jsonb := '[]';
    made record;
BEGIN
    FOR made IN
        WITH new AS MATERIALIZED (
            SELECT each_job.* FROM jsonb_to_recordset(jobs) AS each_job (
                id uuid, type text, fingerprint text, payload text, priority smallint,
                max_attempts integer, timeout_seconds integer,
                backoff_base_seconds double precision, backoff_cap_seconds double precision,
                next_run_at timestamptz, idempotency_key text, created_by text)
            ORDER BY each_job.type, each_job.idempotency_key, each_job.id
        ), free AS MATERIALIZED (
            SELECT new.* FROM new
            WHERE new.idempotency_key IS NULL
               OR job_key_locked(new.type, new.idempotency_key, wait)
        )
        INSERT INTO job (
            id, type, fingerprint, status, payload, priority, attempt, max_attempts,
            timeout_seconds, backoff_base_seconds, backoff_cap_seconds, idempotency_key,
            created_by, created_at, next_run_at)
        SELECT free.id, free.type, free.fingerprint, 'queued', CAST(free.payload AS jsonb),
            free.priority, 0, free.max_attempts, free.timeout_seconds, free.backoff_base_seconds,
            free.backoff_cap_seconds, free.idempotency_key, free.created_by, now,
            coalesce(free.next_run_at, now)
        FROM free
        ON CONFLICT (type, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING id, type, created_at, next_run_at
    LOOP
        job_id := made.id;
        job_created_at := made.created_at;
        job_next_run_at := made.next_run_at;
        events := events || job_event('job.created', made.id, made.type, 0);
        RETURN NEXT;
    END LOOP;
    IF events <> '[]' THEN
        PERFORM job_announce(process, events, keep);
    END IF;
END $$;

CREATE FUNCTION job_end(reports jsonb, process text, keep boolean) RETURNS SETOF job
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- End attempts as reported, if the lease is in force, and announce that.
--
-- The rows are locked before they are read. Rows that another transaction has locked are left out,
-- and so are lost leases.
DECLARE
    now CONSTANT timestamptz := clock_timestamp();
    events jsonb := '[]';
    ended job;
BEGIN
    FOR ended IN
        WITH report AS MATERIALIZED (
            SELECT * FROM jsonb_to_recordset(reports) AS each_report (
                id uuid, token text, outcome text, retryable boolean, spend boolean,
                delay_seconds double precision, result text, error text, still_running boolean)
        ), held AS MATERIALIZED (
            -- By the primary key: other indexes have many dead entries during a long transaction.
            SELECT report.*, running.*,
                report.outcome IN ('released', 'snoozed') AS returned
            FROM report CROSS JOIN LATERAL (
                SELECT job.attempt, job.max_attempts, job.backoff_base_seconds,
                    job.backoff_cap_seconds, job.lease_seconds, job.held_until, job.returns,
                    job.quick_returns, job.cancel_requested_at IS NOT NULL AS cancel_requested,
                    job.started_at > now - interval '10 seconds' AS quickly
                FROM job
                WHERE job.id = report.id AND job.lease_token = report.token
                  AND (
                    CASE
                        WHEN job.status <> 'running' THEN false
                        WHEN report.outcome = 'lost' THEN job.lease_expires_at <= now
                        -- Its worker may report slightly late.
                        WHEN report.outcome = 'timed_out'
                            THEN job.lease_expires_at > now OR job.deadline_at <= now
                        ELSE job.lease_expires_at > now
                    END)
                FOR UPDATE SKIP LOCKED
            ) AS running
        ), decided AS MATERIALIZED (
            SELECT held.*,
                (SELECT open.id FROM job_attempt AS open
                 WHERE open.job_id = held.id AND open.finished_at IS NULL) AS attempt_id,
                CASE
                    WHEN outcome = 'succeeded' THEN 'succeeded'
                    WHEN outcome = 'cancelled' OR cancel_requested THEN 'cancelled'
                    WHEN returned THEN 'queued'
                    WHEN retryable AND attempt < max_attempts THEN 'queued'
                    ELSE 'failed'
                END AS status,
                -- min(cap, base * 2^(n-1)), half of that random. See JobPolicy.backoff.
                coalesce(delay_seconds, least(backoff_cap_seconds,
                    backoff_base_seconds * power(2, least(attempt - 1, 40)))
                    * (0.5 + 0.5 * random())) AS delay,
                -- The first quick return does not wait. Then the delay doubles, so that a job that
                -- is released repeatedly does not run in a tight loop.
                CASE WHEN returned AND quickly AND quick_returns > 0
                    THEN least(60, power(2, least(quick_returns - 1, 6))) ELSE 0 END AS least_delay
            FROM held
        ), changed AS (
            UPDATE job SET
                status = decided.status,
                next_run_at = CASE WHEN decided.status = 'queued' THEN
                    now + make_interval(secs => greatest(decided.delay, decided.least_delay)) END,
                finished_at = CASE WHEN decided.status <> 'queued' THEN now END,
                attempt = CASE WHEN decided.returned OR NOT decided.spend
                    THEN decided.attempt - 1 ELSE decided.attempt END,
                returns = job.returns + (decided.returned OR NOT decided.spend)::integer,
                quick_returns = CASE WHEN decided.returned AND decided.quickly
                    THEN job.quick_returns + 1 ELSE 0 END,
                result = CASE WHEN decided.outcome = 'succeeded'
                    THEN CAST(decided.result AS jsonb) ELSE job.result END,
                error = CASE WHEN decided.outcome = 'succeeded' THEN NULL
                    ELSE coalesce(CAST(decided.error AS jsonb), job.error) END,
                lease_token = CASE WHEN decided.outcome = 'succeeded' THEN job.lease_token END,
                lease_expires_at = NULL, deadline_at = NULL, held_until = NULL
            FROM decided WHERE job.id = decided.id
            RETURNING job.*
        ), closed AS (
            UPDATE job_attempt SET
                finished_at = now,
                outcome = CASE WHEN decided.status = 'cancelled' THEN 'cancelled'
                    ELSE decided.outcome END,
                error = CAST(decided.error AS jsonb),
                -- A worker that is alive may still run a timed-out attempt.
                held_until = CASE
                    WHEN decided.still_running
                        THEN now + make_interval(secs => coalesce(decided.lease_seconds, 30))
                    WHEN decided.still_running IS NULL AND decided.outcome = 'timed_out'
                        AND decided.held_until > now THEN decided.held_until
                    END
            FROM decided WHERE job_attempt.id = decided.attempt_id
        )
        SELECT * FROM changed
    LOOP
        events := events || job_event(
            CASE ended.status WHEN 'queued' THEN 'job.retrying' ELSE 'job.' || ended.status END,
            ended.id, ended.type, ended.attempt);
        -- How many attempts the job has had, by every path: the spent ones and the others.
        IF (ended.attempt + ended.returns) % 32 = 0 THEN
            -- Keep 32 attempts that were given back or cancelled, and 1,000 of all: the most that
            -- a job has unless it is retried after its end.
            DELETE FROM job_attempt
            WHERE job_attempt.job_id = ended.id
              AND job_attempt.outcome IN ('released', 'snoozed', 'cancelled')
              AND job_attempt.id <= (
                SELECT older.id FROM job_attempt AS older
                WHERE older.job_id = ended.id
                  AND older.outcome IN ('released', 'snoozed', 'cancelled')
                ORDER BY older.id DESC OFFSET 32 LIMIT 1);
            IF ended.attempt + ended.returns > 1000 THEN
                DELETE FROM job_attempt
                WHERE job_attempt.job_id = ended.id AND job_attempt.id <= (
                    SELECT older.id FROM job_attempt AS older WHERE older.job_id = ended.id
                    ORDER BY older.id DESC OFFSET 1000 LIMIT 1);
            END IF;
        END IF;
        RETURN NEXT job_small(ended);
    END LOOP;
    IF events <> '[]' THEN
        PERFORM job_announce(process, events, keep);
    END IF;
END $$;

CREATE FUNCTION job_recover(
    process text, keep boolean, most integer, look_back double precision,
    lease double precision, timed_out text, lost text)
RETURNS SETOF job
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- End the attempts whose lease has expired: `timed_out` past the deadline, `lost` before it.
-- `look_back`, in seconds, bounds the rows that are read: older expired leases have been ended.
DECLARE
    now CONSTANT timestamptz := clock_timestamp();
    since CONSTANT timestamptz :=
        coalesce(now - make_interval(secs => look_back), '-infinity');
    reports jsonb;
BEGIN
    -- A lease that ends later than its length from now shows that the clock has stepped back. It is
    -- restarted, so that a dead worker is detected in time. `lease`, the length of this client's
    -- leases, bounds the rows that are read.
    UPDATE job SET
        held_until = now + make_interval(secs => job.lease_seconds),
        deadline_at = least(job.deadline_at, now + make_interval(secs => job.timeout_seconds)),
        lease_expires_at = least(
            now + make_interval(secs => job.lease_seconds),
            job.deadline_at, now + make_interval(secs => job.timeout_seconds))
    WHERE job.id IN (
        SELECT ahead.id FROM job AS ahead
        WHERE ahead.status = 'running'
          AND ahead.lease_expires_at > now + make_interval(secs => lease + 1)
          AND ahead.lease_expires_at > now + make_interval(secs => ahead.lease_seconds + 1)
        ORDER BY ahead.lease_expires_at DESC LIMIT most FOR UPDATE SKIP LOCKED);
    SELECT jsonb_agg(jsonb_build_object(
        'id', expired.id, 'token', expired.lease_token, 'retryable', true, 'spend', true,
        'outcome', CASE WHEN expired.deadline_at <= now THEN 'timed_out' ELSE 'lost' END,
        'error', CASE WHEN expired.deadline_at <= now THEN timed_out ELSE lost END))
    INTO reports
    FROM (
        SELECT job.id, job.lease_token, job.deadline_at FROM job
        WHERE job.status = 'running' AND job.lease_expires_at <= now
          AND job.lease_expires_at >= since
        ORDER BY job.lease_expires_at LIMIT most FOR UPDATE SKIP LOCKED
    ) AS expired;
    IF reports IS NOT NULL THEN
        RETURN QUERY SELECT * FROM job_end(reports, process, keep);
    END IF;
END $$;

CREATE FUNCTION job_running(name text, at timestamptz) RETURNS integer
LANGUAGE plpgsql AS $$
-- Count the used places of a type's concurrency limit: its running jobs, and its timed-out attempts
-- whose handlers have not stopped.
BEGIN
    RETURN (SELECT count(*) FROM job WHERE job.status = 'running' AND job.type = name)
        -- Not a join: without statistics its plan reads all jobs of the type.
        + (SELECT count(*) FROM job_attempt
           WHERE job_attempt.held_until > at AND job_attempt.finished_at IS NOT NULL
             AND name = (SELECT job.type FROM job WHERE job.id = job_attempt.job_id));
END $$;

CREATE FUNCTION job_head(heads jsonb, level smallint) RETURNS timestamptz
LANGUAGE sql IMMUTABLE AS $$
-- Return the time from which on jobs of a priority are read.
SELECT CASE WHEN heads IS NULL THEN '-infinity'::timestamptz ELSE
    (SELECT CAST(head.value ->> 1 AS timestamptz) FROM jsonb_array_elements(heads) AS head
     WHERE CAST(head.value ->> 0 AS smallint) = level) END
$$;

CREATE FUNCTION job_next_level(
    name text, below smallint, due timestamptz, heads jsonb) RETURNS smallint
LANGUAGE plpgsql AS $$
-- Return the highest priority below `below` at which the type has a due job, or null. It reads one
-- entry of the index `job_claim` per priority.
DECLARE
    level smallint;
    head timestamptz;
BEGIN
    IF heads IS NOT NULL THEN
        SELECT max(CAST(known.value ->> 0 AS smallint)) INTO level
        FROM jsonb_array_elements(heads) AS known
        WHERE CAST(known.value ->> 0 AS smallint) < below AND EXISTS (
            SELECT 1 FROM job
            WHERE job.status = 'queued' AND job.type = name
              AND job.priority = CAST(known.value ->> 0 AS smallint)
              AND job.next_run_at >= CAST(known.value ->> 1 AS timestamptz)
              AND job.next_run_at <= due);
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

CREATE FUNCTION job_claim(
    wanted jsonb, most integer, worker text, lease double precision, process text, keep boolean,
    look_back double precision, timed_out text, lost text)
RETURNS SETOF job
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- Lease up to `most` due jobs of the wanted types, for `lease` seconds, and announce that.
--
-- `wanted` is an array of {"type", "limit", "heads"} in the order of their turns. `limit` is the
-- type's concurrency limit or null. `heads`, if given, lists [priority, next_run_at] pairs: only
-- jobs from these times on are read. See `QueueHeads` in postgresql.py.
--
-- Higher priorities go first. Types of one priority take turns, in the order given. Within a type
-- and priority the oldest goes first. Rows that another transaction has locked are skipped. No more
-- jobs are leased once their payloads have 1,000,000 bytes of text: a client reads them whole.
--
-- Jobs of a type with a limit are taken only under the type's lock, after its running jobs were
-- counted in a later statement, which sees what the previous holder of the lock committed. A type
-- that had no due job when the claim began is not locked, and none of its jobs are taken.
--
-- Attempts whose lease has expired are ended first, and their jobs are returned too; unlike leased
-- jobs they are not running. The `next_run_at` of a leased job is when it was due.
DECLARE
    now timestamptz := clock_timestamp();
    names text[];         -- the wanted types
    limits integer[];     -- their limits, or null
    heads jsonb[];        -- their known heads, or null
    tops smallint[];      -- the highest priority at which each has a due job, or null
    rooms integer[];      -- how many jobs may be taken from each
    lane integer;         -- an index into these arrays
    lanes integer;        -- how many types take turns
    level smallint;       -- the current priority
    head timestamptz;     -- from which time on a type's jobs are read
    remaining integer := most;
    bytes_left bigint := 1000000;
    share integer;
    got integer;
    events jsonb := '[]';
    leased record;
    whole job;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'job_claim counts running jobs under a lock, which needs READ COMMITTED';
    END IF;
    IF EXISTS (
        SELECT 1 FROM job WHERE job.status = 'running' AND job.lease_expires_at <= now
          AND job.lease_expires_at >=
              coalesce(now - make_interval(secs => look_back), '-infinity')
    ) OR EXISTS (
        SELECT 1 FROM job WHERE job.status = 'running'
          AND job.lease_expires_at > now + make_interval(secs => lease + 1)
    ) THEN
        RETURN QUERY SELECT *
            FROM job_recover(process, keep, 100, look_back, lease, timed_out, lost);
        -- Without a backoff their jobs are due from now on.
        now := clock_timestamp();
    END IF;

    SELECT array_agg(want.value ->> 'type' ORDER BY want.place),
        array_agg(CAST(want.value ->> 'limit' AS integer) ORDER BY want.place),
        array_agg(nullif(want.value -> 'heads', 'null') ORDER BY want.place)
    INTO names, limits, heads
    FROM jsonb_array_elements(wanted) WITH ORDINALITY AS want (value, place);
    FOR lane IN 1 .. coalesce(cardinality(names), 0) LOOP
        tops[lane] := job_next_level(names[lane], 101::smallint, now, heads[lane]);
        rooms[lane] := most;
    END LOOP;

    -- In a fixed order, so that two claims cannot deadlock.
    FOR lane IN
        SELECT place FROM generate_subscripts(names, 1) AS place
        WHERE tops[place] IS NOT NULL AND limits[place] IS NOT NULL ORDER BY names[place]
    LOOP
        PERFORM pg_advisory_xact_lock(hashtextextended(
            'job type ' || to_regclass('job')::oid || ' ' || names[lane], 0));
    END LOOP;
    now := clock_timestamp();
    FOR lane IN 1 .. coalesce(cardinality(names), 0) LOOP
        IF tops[lane] IS NOT NULL AND limits[lane] IS NOT NULL THEN
            rooms[lane] := limits[lane] - job_running(names[lane], now);
            IF rooms[lane] <= 0 THEN
                tops[lane] := NULL;
            END IF;
        END IF;
    END LOOP;

    WHILE remaining > 0 LOOP
        SELECT max(top), count(*) FILTER (WHERE top = (SELECT max(t) FROM unnest(tops) AS t))
        INTO level, lanes FROM unnest(tops) AS top;
        EXIT WHEN level IS NULL;
        share := ceil(remaining::numeric / lanes);
        FOR lane IN 1 .. cardinality(names) LOOP
            CONTINUE WHEN tops[lane] IS DISTINCT FROM level;
            got := 0;
            head := job_head(heads[lane], level);
            FOR leased IN
                WITH due AS MATERIALIZED (
                    SELECT job.id, job.next_run_at AS due_at,
                        -- As in `job_small`: a compressed value is larger when it is sent.
                        CASE WHEN pg_column_size(job.payload) <= 8192
                                AND pg_column_compression(job.payload) IS NULL
                            THEN pg_column_size(job.payload)
                            ELSE octet_length(CAST(job.payload AS text)) END AS bytes
                    FROM job
                    WHERE job.status = 'queued' AND job.type = names[lane]
                      AND job.priority = level AND job.next_run_at <= now
                      AND job.next_run_at >= head
                    ORDER BY job.next_run_at, job.id
                    LIMIT least(share, rooms[lane], remaining)
                    FOR UPDATE SKIP LOCKED
                ), fitting AS MATERIALIZED (
                    SELECT * FROM (
                        SELECT due.id, due.due_at, due.bytes,
                            sum(due.bytes) OVER (ORDER BY due.due_at, due.id) AS total
                        FROM due) AS summed
                    WHERE summed.total - summed.bytes < bytes_left
                ), claimed AS (
                    UPDATE job SET
                        status = 'running', attempt = job.attempt + 1, next_run_at = NULL,
                        started_at = now, worker_id = worker, progress = NULL,
                        lease_token = replace(CAST(gen_random_uuid() AS text), '-', ''),
                        lease_seconds = lease,
                        held_until = now + make_interval(secs => lease),
                        deadline_at = now + make_interval(secs => job.timeout_seconds),
                        lease_expires_at =
                            now + make_interval(secs => least(job.timeout_seconds, lease))
                    FROM fitting WHERE job.id = fitting.id
                    RETURNING job AS whole, fitting.due_at, fitting.total
                ), opened AS (
                    INSERT INTO job_attempt (job_id, attempt, worker_id, started_at, lease_token)
                    SELECT (claimed.whole).id, (claimed.whole).attempt, worker, now,
                        (claimed.whole).lease_token
                    FROM claimed
                )
                SELECT claimed.whole, claimed.due_at, max(claimed.total) OVER () AS bytes
                FROM claimed
            LOOP
                whole := job_small(leased.whole);
                whole.next_run_at := leased.due_at;
                events := events
                    || job_event('job.started', whole.id, whole.type, whole.attempt);
                got := got + 1;
                RETURN NEXT whole;
            END LOOP;
            IF got > 0 THEN
                bytes_left := bytes_left - leased.bytes;
            END IF;
            IF got < least(share, rooms[lane], remaining) THEN
                tops[lane] := job_next_level(names[lane], level, now, heads[lane]);
            ELSIF got = rooms[lane] THEN
                tops[lane] := NULL;
            END IF;
            rooms[lane] := rooms[lane] - got;
            remaining := remaining - got;
            EXIT WHEN remaining = 0 OR bytes_left <= 0;
        END LOOP;
        EXIT WHEN bytes_left <= 0;
    END LOOP;
    IF events <> '[]' THEN
        PERFORM job_announce(process, events, keep);
    END IF;
END $$;

CREATE FUNCTION job_next_due(wanted jsonb) RETURNS double precision
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- Return the seconds until a claim of these types may find more jobs, or null if no time is known.
-- For a type at its limit, only the ends of leases and places count.
DECLARE
    now CONSTANT timestamptz := clock_timestamp();
    soonest timestamptz;
    want record;
    level smallint;
    head timestamptz;
    below smallint;
BEGIN
    FOR want IN
        SELECT asked.value ->> 'type' AS name, CAST(asked.value ->> 'limit' AS integer) AS most
        FROM jsonb_array_elements(wanted) AS asked (value)
    LOOP
        CONTINUE WHEN want.most IS NOT NULL AND want.most <= job_running(want.name, now);
        below := 101;
        LOOP
            SELECT job.priority, job.next_run_at INTO level, head FROM job
            WHERE job.status = 'queued' AND job.type = want.name AND job.priority < below
            ORDER BY job.priority DESC, job.next_run_at, job.id LIMIT 1;
            EXIT WHEN NOT FOUND;
            soonest := least(soonest, head);
            below := level;
        END LOOP;
    END LOOP;
    SELECT job.lease_expires_at INTO head FROM job
    WHERE job.status = 'running' ORDER BY job.lease_expires_at LIMIT 1;
    soonest := least(soonest, head);
    SELECT job_attempt.held_until INTO head FROM job_attempt
    WHERE job_attempt.held_until > now AND job_attempt.finished_at IS NOT NULL
    ORDER BY job_attempt.held_until LIMIT 1;
    RETURN EXTRACT(EPOCH FROM least(soonest, head) - now);
END $$;

CREATE FUNCTION job_waiting(ids jsonb, most integer)
RETURNS TABLE (
    id uuid, due_in_seconds double precision, running bigint,
    worker_seen_seconds_ago double precision, ahead bigint)
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- Return what queued jobs wait for. Each count reads one range of an index, up to `most` rows.
DECLARE
    now CONSTANT timestamptz := clock_timestamp();
    waiting job;
    level smallint;
BEGIN
    FOR waiting IN
        SELECT found.* FROM jsonb_array_elements_text(ids) AS wanted (id)
        CROSS JOIN LATERAL (
            SELECT job.* FROM job WHERE job.id = CAST(wanted.id AS uuid) OFFSET 0) AS found
    LOOP
        -- Not in the query above: its plan would read all queued jobs.
        CONTINUE WHEN waiting.status <> 'queued';
        id := waiting.id;
        due_in_seconds := EXTRACT(EPOCH FROM waiting.next_run_at - now);
        running := job_running(waiting.type, now);
        worker_seen_seconds_ago :=
            (SELECT EXTRACT(EPOCH FROM now - job_type_state.worker_seen_at)
             FROM job_type_state WHERE job_type_state.type = waiting.type);
        ahead :=
            (SELECT count(*) FROM (
                SELECT 1 FROM job
                WHERE job.status = 'queued' AND job.type = waiting.type
                  AND job.priority = waiting.priority
                  AND (job.next_run_at, job.id) < (waiting.next_run_at, waiting.id)
                ORDER BY job.next_run_at, job.id LIMIT most) AS earlier);
        -- Priority by priority, so that jobs that are scheduled for later are not read.
        level := job_next_level(waiting.type, 101::smallint, now, NULL);
        WHILE level > waiting.priority AND ahead < most LOOP
            ahead := ahead +
                (SELECT count(*) FROM (
                    SELECT 1 FROM job
                    WHERE job.status = 'queued' AND job.type = waiting.type
                      AND job.priority = level AND job.next_run_at <= now
                    ORDER BY job.next_run_at, job.id LIMIT most) AS higher);
            level := job_next_level(waiting.type, level, now, NULL);
        END LOOP;
        RETURN NEXT;
    END LOOP;
END $$;

CREATE FUNCTION job_renew(
    renewals jsonb, lease double precision, process text, keep boolean)
RETURNS TABLE (
    job_id uuid, token text, state text, expires_at timestamptz, seconds_left double precision,
    cancel_requested boolean)
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- Renew leases, never past their attempt's deadline, and store progress.
--
-- `state` is `renewed`, `lost`, or `busy` if another transaction has locked the row and the lease
-- is unchanged. A timed-out attempt is `lost`, and its place in the limit is renewed.
DECLARE
    now CONSTANT timestamptz := clock_timestamp();
    events jsonb := '[]';
    renewal record;
BEGIN
    FOR renewal IN
        WITH asked AS MATERIALIZED (
            SELECT * FROM jsonb_to_recordset(renewals)
                AS each_renewal (id uuid, token text, progress text)
        ), held AS MATERIALIZED (
            -- By the primary key, as in `job_end`.
            SELECT asked.*, running.deadline_at FROM asked CROSS JOIN LATERAL (
                SELECT job.deadline_at FROM job
                WHERE job.id = asked.id AND job.lease_token = asked.token
                  AND CASE WHEN job.status = 'running' THEN job.lease_expires_at > now
                      ELSE false END
                FOR UPDATE SKIP LOCKED
            ) AS running
        ), renewed AS (
            UPDATE job SET
                lease_expires_at =
                    least(now + make_interval(secs => lease), held.deadline_at),
                held_until = now + make_interval(secs => lease),
                lease_seconds = lease,
                progress = coalesce(CAST(held.progress AS jsonb), job.progress)
            FROM held WHERE job.id = held.id
            RETURNING job.id, job.lease_token, job.type, job.attempt, job.lease_expires_at,
                job.deadline_at, job.cancel_requested_at
        ), kept AS (
            UPDATE job_attempt SET held_until = now + make_interval(secs => lease)
            FROM asked
            WHERE job_attempt.job_id = asked.id AND job_attempt.lease_token = asked.token
              AND job_attempt.finished_at IS NOT NULL AND job_attempt.held_until IS NOT NULL
        )
        SELECT asked.id, asked.token, asked.progress, renewed.type, renewed.attempt,
            renewed.id IS NOT NULL AS renewed, renewed.lease_expires_at, renewed.deadline_at,
            renewed.cancel_requested_at
        -- A process may send two leases of a job: one that it lost, and the one in force.
        FROM asked LEFT JOIN renewed
            ON renewed.id = asked.id AND renewed.lease_token = asked.token
    LOOP
        job_id := renewal.id;
        token := renewal.token;
        IF renewal.renewed THEN
            state := 'renewed';
            expires_at := renewal.lease_expires_at;
            seconds_left := EXTRACT(EPOCH FROM renewal.deadline_at - now);
            cancel_requested := renewal.cancel_requested_at IS NOT NULL;
            IF renewal.progress IS NOT NULL THEN
                events := events
                    || job_event('job.progressed', renewal.id, renewal.type, renewal.attempt);
            END IF;
        ELSE
            SELECT 'busy', job.lease_expires_at, EXTRACT(EPOCH FROM job.deadline_at - now),
                job.cancel_requested_at IS NOT NULL
            INTO state, expires_at, seconds_left, cancel_requested
            FROM job
            WHERE job.id = renewal.id AND job.lease_token = renewal.token
              AND job.status = 'running' AND job.lease_expires_at > now;
            state := coalesce(state, 'lost');
        END IF;
        RETURN NEXT;
    END LOOP;
    IF events <> '[]' THEN
        PERFORM job_announce(process, events, keep);
    END IF;
END $$;

CREATE FUNCTION job_settle(ended jsonb, process text, keep boolean) RETURNS void
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- Free the places of timed-out attempts whose handlers have stopped.
DECLARE
    events jsonb;
BEGIN
    WITH asked AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(ended) AS each_end (id uuid, token text)
    ), settled AS (
        UPDATE job_attempt SET held_until = NULL FROM asked
        WHERE job_attempt.job_id = asked.id AND job_attempt.lease_token = asked.token
          AND job_attempt.finished_at IS NOT NULL AND job_attempt.held_until IS NOT NULL
        RETURNING job_attempt.job_id, job_attempt.attempt
    )
    SELECT jsonb_agg(job_event('job.settled', job.id, job.type, settled.attempt) -> 0)
    INTO events FROM settled JOIN job ON job.id = settled.job_id;
    IF events IS NOT NULL THEN
        PERFORM job_announce(process, events, keep);
    END IF;
END $$;

CREATE FUNCTION job_cancel(wanted uuid, process text, keep boolean) RETURNS SETOF job
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- Cancel a queued job, or record that the worker of a running job must stop.
DECLARE
    now CONSTANT timestamptz := clock_timestamp();
    changed job;
BEGIN
    UPDATE job SET
        status = CASE job.status WHEN 'queued' THEN 'cancelled' ELSE job.status END,
        finished_at = CASE job.status WHEN 'queued' THEN now END,
        next_run_at = NULL,
        cancel_requested_at = coalesce(job.cancel_requested_at, now)
    WHERE job.id = wanted AND job.status IN ('queued', 'running')
    RETURNING job.* INTO changed;
    IF FOUND THEN
        PERFORM job_announce(process, job_event(
            CASE changed.status WHEN 'running' THEN 'job.cancel_requested'
                ELSE 'job.cancelled' END,
            changed.id, changed.type, changed.attempt), keep);
        RETURN NEXT changed;
    END IF;
END $$;

CREATE FUNCTION job_retry(wanted uuid, process text, keep boolean) RETURNS SETOF job
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
-- Queue a failed or cancelled job. If no attempt is left, allow one more.
DECLARE
    now CONSTANT timestamptz := clock_timestamp();
    changed job;
BEGIN
    UPDATE job SET
        status = 'queued', next_run_at = now, finished_at = NULL, cancel_requested_at = NULL,
        lease_token = NULL, progress = NULL, quick_returns = 0,
        max_attempts = greatest(job.max_attempts, job.attempt + 1)
    WHERE job.id = wanted AND job.status IN ('failed', 'cancelled')
    RETURNING job.* INTO changed;
    IF FOUND THEN
        PERFORM job_announce(process,
            job_event('job.retrying', changed.id, changed.type, changed.attempt), keep);
        RETURN NEXT changed;
    END IF;
END $$;
