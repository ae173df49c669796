-- Quicker claims and reports of success. `job_claim` does what it did in 0003, with fewer statements
-- that are planned for each call, and with its events as an array, as in 0005.

CREATE FUNCTION job_forget_attempts(ended uuid, attempts integer) RETURNS void
LANGUAGE plpgsql AS $$
-- Delete the oldest attempts of a job that has had many, by every path. Keep 32 that were given
-- back or cancelled, and 1,000 of all: the most that a job has unless it is retried after its end.
BEGIN
    DELETE FROM job_attempt
    WHERE job_attempt.job_id = ended AND job_attempt.outcome IN ('released', 'snoozed', 'cancelled')
      AND job_attempt.id <= (
        SELECT older.id FROM job_attempt AS older
        WHERE older.job_id = ended AND older.outcome IN ('released', 'snoozed', 'cancelled')
        ORDER BY older.id DESC OFFSET 32 LIMIT 1);
    IF attempts > 1000 THEN
        DELETE FROM job_attempt
        WHERE job_attempt.job_id = ended AND job_attempt.id <= (
            SELECT older.id FROM job_attempt AS older WHERE older.job_id = ended
            ORDER BY older.id DESC OFFSET 1000 LIMIT 1);
    END IF;
END $$;

CREATE FUNCTION job_succeed(reports jsonb, process text, keep boolean) RETURNS SETOF job
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- End attempts as succeeded, if the lease is in force, and announce that. Of the jobs, only the id,
-- type, status and attempt are returned.
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
            SELECT report.id, report.result
            FROM jsonb_to_recordset(reports) AS report (id uuid, token text, result text)
            CROSS JOIN LATERAL (
                SELECT FROM job
                WHERE job.id = report.id AND job.lease_token = report.token
                  AND CASE WHEN job.status = 'running' THEN job.lease_expires_at > now
                      ELSE false END
                FOR UPDATE SKIP LOCKED) AS running
        ), closed AS (
            UPDATE job_attempt SET
                finished_at = now, outcome = 'succeeded', error = NULL, held_until = NULL
            FROM held WHERE job_attempt.job_id = held.id AND job_attempt.finished_at IS NULL
        )
        UPDATE job SET
            status = 'succeeded', next_run_at = NULL, finished_at = now, quick_returns = 0,
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

CREATE OR REPLACE FUNCTION job_claim(
    wanted jsonb, most integer, worker text, lease double precision, process text, keep boolean,
    look_back double precision, timed_out text, lost text)
RETURNS SETOF job
LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
-- Lease up to `most` due jobs of the wanted types, for `lease` seconds, and announce that.
--
-- `wanted` is an array of {"type", "limit", "heads", "group", "fingerprint", "readable", "waits"} in
-- the order of their turns. `limit` is the type's concurrency limit or null. `heads`, if given, lists
-- [priority, next_run_at] pairs: only jobs from these times on are read. See `QueueHeads` in
-- postgresql.py. The current and the former names of a type have the same number `group`, and share
-- its limit. `fingerprint` is that of the worker: jobs that others have parked and it has not are
-- leased too. With `readable`, an array of fingerprints, only jobs that were admitted under one of
-- them are leased, parked or not. With `waits` false, nothing is leased if another claim
-- holds a lock: to lease jobs of other types instead would pass over higher priorities.
--
-- Higher priorities go first. Types of one priority take turns, in the order given. Within a type
-- and priority the oldest goes first, whatever its name and whether or not it is parked: otherwise a
-- worker that leases one job at a time would take parked jobs only when no job is due. Rows that
-- another transaction has locked are skipped. No more jobs are leased once their payloads have
-- 1,000,000 bytes of text: a client reads them whole.
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
    groups integer[];     -- the names with the same number share a limit
    workers text[];       -- the fingerprints of the worker, or null
    readable jsonb[];     -- the fingerprints that the worker can read, or null
    waits boolean;        -- whether to wait for the locks of types with a limit
    refusers text[];      -- of a lane of parked jobs: who has refused them. Null: due jobs
    tops smallint[];      -- the highest priority at which each has a due job, or null
    rooms integer[];      -- how many jobs may be taken from each group
    lane integer;         -- an index into these arrays
    wide integer;         -- how many lanes of due jobs there are
    refused text;         -- the fingerprints that have refused the jobs of a lane
    reads text[];         -- the fingerprints that the worker can read in a lane
    lanes integer;        -- how many types take turns
    turns integer[];      -- the lanes of a priority in the order of their turns
    lock bigint;          -- the advisory lock of a name
    several boolean;      -- whether a group has more than one lane
    level smallint;       -- the current priority
    head timestamptz;     -- from which time on a type's jobs are read
    remaining integer := most;
    bytes_left bigint := 1000000;
    share integer;
    got integer;
    events jsonb[] := '{}';
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
        array_agg(nullif(want.value -> 'heads', 'null') ORDER BY want.place),
        array_agg(coalesce(CAST(want.value ->> 'group' AS integer), want.place::integer)
            ORDER BY want.place),
        array_agg(want.value ->> 'fingerprint' ORDER BY want.place),
        array_agg(nullif(want.value -> 'readable', 'null') ORDER BY want.place),
        bool_and(coalesce(CAST(want.value ->> 'waits' AS boolean), true))
    INTO names, limits, heads, groups, workers, readable, waits
    FROM jsonb_array_elements(wanted) WITH ORDINALITY AS want (value, place);
    wide := coalesce(cardinality(names), 0);
    FOR lane IN 1 .. wide LOOP
        tops[lane] := job_next_level(names[lane], 101::smallint, now, heads[lane]);
        refusers[lane] := NULL;
        rooms[groups[lane]] := most;
    END LOOP;
    -- One entry of an index, which is empty unless jobs are parked.
    IF EXISTS (SELECT 1 FROM job_parked WHERE job_parked.parked_at IS NOT NULL) THEN
        FOR lane IN 1 .. wide LOOP
            CONTINUE WHEN workers[lane] IS NULL AND readable[lane] IS NULL;
            refused := '';
            LOOP
                SELECT job_parked.refused_by INTO refused FROM job_parked
                WHERE job_parked.parked_at IS NOT NULL AND job_parked.type = names[lane]
                  AND job_parked.refused_by > refused
                ORDER BY job_parked.refused_by LIMIT 1;
                EXIT WHEN NOT FOUND OR cardinality(names) >= 1000;
                CONTINUE WHEN strpos(refused, workers[lane]) > 0;
                names := names || names[lane];
                limits := limits || limits[lane];
                heads := heads || NULL::jsonb;
                groups := groups || groups[lane];
                readable := readable || readable[lane];
                refusers := refusers || refused;
                tops := tops || job_parked_level(names[lane], refused, 101::smallint);
            END LOOP;
        END LOOP;
    END IF;

    -- In a fixed order, so that two claims cannot deadlock. All names of a type are locked, because
    -- the jobs of each count. Without limits, the query would find nothing.
    IF array_remove(limits, NULL) <> '{}' THEN
        FOR lane IN
            SELECT min(place) FROM generate_subscripts(names, 1) AS place
            WHERE limits[place] IS NOT NULL AND groups[place] IN (
                SELECT groups[active] FROM generate_subscripts(names, 1) AS active
                WHERE tops[active] IS NOT NULL)
            GROUP BY names[place] ORDER BY names[place]
        LOOP
            lock := hashtextextended(
                'job type ' || to_regclass('job')::oid || ' ' || names[lane], 0);
            IF waits THEN
                PERFORM pg_advisory_xact_lock(lock);
            ELSIF NOT pg_try_advisory_xact_lock(lock) THEN
                RETURN;
            END IF;
        END LOOP;
    END IF;
    now := clock_timestamp();
    FOR lane IN 1 .. wide LOOP
        IF limits[lane] IS NOT NULL AND EXISTS (
            SELECT 1 FROM generate_subscripts(names, 1) AS active
            WHERE groups[active] = groups[lane] AND tops[active] IS NOT NULL
        ) THEN
            -- The limit and not `most`, the first time: `most` bounds each turn below.
            rooms[groups[lane]] := CASE WHEN groups[lane] = ANY(groups[1 : lane - 1])
                THEN rooms[groups[lane]] ELSE limits[lane] END - job_running(names[lane], now);
        END IF;
    END LOOP;
    FOR lane IN 1 .. coalesce(cardinality(names), 0) LOOP
        IF rooms[groups[lane]] <= 0 THEN
            tops[lane] := NULL;
        END IF;
    END LOOP;
    -- Again: a job that ended before the count is not to be recorded as running longer than that.
    now := clock_timestamp();

    several := cardinality(names) > (SELECT count(DISTINCT number) FROM unnest(groups) AS number);
    WHILE remaining > 0 LOOP
        SELECT max(top), count(*) FILTER (WHERE top = (SELECT max(t) FROM unnest(tops) AS t))
        INTO level, lanes FROM unnest(tops) AS top;
        EXIT WHEN level IS NULL;
        share := ceil(remaining::numeric / lanes);
        IF several THEN
            turns := ARRAY(
                SELECT ranked.place FROM (
                    SELECT place, row_number() OVER (
                        PARTITION BY groups[place]
                        ORDER BY CASE
                            WHEN refusers[place] IS NULL THEN (
                                SELECT job.next_run_at FROM job
                                WHERE job.status = 'queued' AND job.type = names[place]
                                  AND job.priority = level AND job.next_run_at <= now
                                  AND job.next_run_at >= job_head(heads[place], level)
                                ORDER BY job.next_run_at LIMIT 1)
                            ELSE (
                                SELECT job_parked.due_at FROM job_parked
                                WHERE job_parked.parked_at IS NOT NULL
                                  AND job_parked.type = names[place]
                                  AND job_parked.refused_by = refusers[place]
                                  AND job_parked.priority = level
                                ORDER BY job_parked.due_at LIMIT 1)
                            END, place) AS turn
                    FROM generate_subscripts(tops, 1) AS place
                    WHERE tops[place] = level) AS ranked
                ORDER BY ranked.turn, groups[ranked.place]);
        ELSE
            turns := ARRAY(
                SELECT place FROM generate_subscripts(tops, 1) AS place
                WHERE tops[place] = level ORDER BY groups[place]);
        END IF;
        FOREACH lane IN ARRAY turns LOOP
            got := 0;
            head := '-infinity';
            IF heads[lane] IS NOT NULL THEN
                head := job_head(heads[lane], level);
            END IF;
            refused := refusers[lane];
            reads := CASE WHEN readable[lane] IS NOT NULL
                THEN ARRAY(SELECT jsonb_array_elements_text(readable[lane])) END;
            FOR leased IN
                WITH due_now AS MATERIALIZED (
                    SELECT job.id, job.next_run_at AS due_at,
                        -- As in `job_small`: a compressed value is larger when it is sent.
                        CASE WHEN pg_column_size(job.payload) <= 8192
                                AND pg_column_compression(job.payload) IS NULL
                            THEN pg_column_size(job.payload)
                            ELSE octet_length(CAST(job.payload AS text)) END AS bytes
                    FROM job
                    WHERE refused IS NULL
                      AND job.status = 'queued' AND job.type = names[lane]
                      AND job.priority = level AND job.next_run_at <= now
                      AND job.next_run_at >= head
                      AND (reads IS NULL OR job.fingerprint = ANY(reads))
                    ORDER BY job.next_run_at, job.id
                    LIMIT least(share, rooms[groups[lane]], remaining)
                    FOR UPDATE SKIP LOCKED
                ), parked AS MATERIALIZED (
                    SELECT job_parked.job_id, job_parked.due_at FROM job_parked
                    WHERE refused IS NOT NULL
                      AND job_parked.parked_at IS NOT NULL AND job_parked.type = names[lane]
                      AND job_parked.refused_by = refused AND job_parked.priority = level
                      AND (reads IS NULL OR job_parked.fingerprint = ANY(reads))
                    ORDER BY job_parked.due_at, job_parked.job_id
                    LIMIT least(share, rooms[groups[lane]], remaining)
                    FOR UPDATE SKIP LOCKED
                ), due_parked AS MATERIALIZED (
                    SELECT job.id, parked.due_at,
                        CASE WHEN pg_column_size(job.payload) <= 8192
                                AND pg_column_compression(job.payload) IS NULL
                            THEN pg_column_size(job.payload)
                            ELSE octet_length(CAST(job.payload AS text)) END AS bytes
                    FROM parked CROSS JOIN LATERAL (
                        SELECT job.* FROM job WHERE job.id = parked.job_id
                          AND job.status = 'queued'
                        FOR UPDATE SKIP LOCKED) AS job
                ), due AS MATERIALIZED (
                    SELECT * FROM due_now UNION ALL SELECT * FROM due_parked
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
                    RETURNING job AS whole, fitting.due_at, fitting.total, (
                        pg_column_size(job.payload) > 8192 OR pg_column_size(job.error) > 8192
                        OR pg_column_size(job.result) > 8192
                        OR pg_column_compression(job.payload) IS NOT NULL
                        OR pg_column_compression(job.error) IS NOT NULL
                        OR pg_column_compression(job.result) IS NOT NULL) AS may_be_large
                ), opened AS (
                    INSERT INTO job_attempt (job_id, attempt, worker_id, started_at, lease_token)
                    SELECT (claimed.whole).id, (claimed.whole).attempt, worker, now,
                        (claimed.whole).lease_token
                    FROM claimed
                )
                SELECT claimed.whole, claimed.due_at, claimed.may_be_large,
                    max(claimed.total) OVER () AS bytes
                FROM claimed
            LOOP
                whole := leased.whole;
                IF leased.may_be_large THEN
                    whole := job_small(whole);
                END IF;
                -- Where the next claim starts to read. That of a parked job says nothing.
                whole.next_run_at := CASE WHEN refused IS NULL
                    THEN leased.due_at ELSE '1970-01-01 00:00:00+00' END;
                events := events
                    || (job_event('job.started', whole.id, whole.type, whole.attempt) -> 0);
                got := got + 1;
                RETURN NEXT whole;
            END LOOP;
            IF got > 0 THEN
                bytes_left := bytes_left - leased.bytes;
            END IF;
            IF got < least(share, rooms[groups[lane]], remaining) THEN
                tops[lane] := CASE WHEN refused IS NULL
                    THEN job_next_level(names[lane], level, now, heads[lane])
                    ELSE job_parked_level(names[lane], refused, level) END;
            ELSIF got = rooms[groups[lane]] THEN
                tops[lane] := NULL;
            END IF;
            rooms[groups[lane]] := rooms[groups[lane]] - got;
            remaining := remaining - got;
            EXIT WHEN remaining = 0 OR bytes_left <= 0;
        END LOOP;
        EXIT WHEN bytes_left <= 0;
    END LOOP;
    IF events <> '{}' THEN
        PERFORM job_announce(process, to_jsonb(events), keep);
    END IF;
END $$;
