"""Which jobs to list, and the query of a page: each filter is served by an index.

Pages are in the order of ids, which is that of creation. The index is chosen here and not by the
database: the other conditions are written so that no index can serve them. So a page costs the same
on both databases, with and without statistics.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, NamedTuple

import sqlalchemy
from sqlalchemy import func, union_all
from sqlalchemy.sql.visitors import replacement_traverse
from sqlmodel import col, select

from job_registry_api.queue.models import (
    FINAL,
    Job,
    JobCount,
    JobRecord,
    JobStatus,
    Owner,
    error_code,
    error_message,
)

MAX_SEARCH: Final = 255
"""The longest text to search for, in characters."""

SEARCHED_JOBS: Final = 10_000
"""How many jobs a search for words reads at most, the newest first.

No index finds words inside a text on both databases, and it would make each failure more expensive.
"""

ID_SLACK: Final = timedelta(hours=1)
"""How far the clock of the process that enqueued a job may differ from that of the database.

The id has the time of the process, `created_at` that of the database. A range of `created_at` is
read as a range of ids that is longer by this at each end.
"""

WIDE_RANGE: Final = 5_000
"""How many jobs of a status that finished in a range of time are read and sorted at most. Those of
a wider range are found among all jobs of the status, the newest first."""

WALKED_JOBS: Final = 10_000
"""How many jobs of each status are read at most in search of those that finished in a range."""

WALK_SLACK: Final = timedelta(minutes=5)
"""The same as `ID_SLACK` for these searches, which read the jobs of this time as well."""

JSON_VALUES: Final = ("payload", "progress", "result", "error")
"""The columns of a job that may be large."""

SMALL: Final = 4_096
"""The length up to which the JSON values of a page are read together with its jobs."""

FIRST_ID: Final = uuid.UUID(int=0)
LAST_ID: Final = uuid.UUID(int=2**128 - 1)
"""Ids that no job has: lower and greater than those of all jobs."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a list of jobs, newest first: `size` of the jobs that are older than the job
    `after` and newer than the job `before`. With `from_end` they are the last of these, not the
    first."""

    size: int
    after: uuid.UUID | None = None
    before: uuid.UUID | None = None
    from_end: bool = False

    def conditions(self) -> list[Any]:
        """Return the conditions that a job is between the ends."""
        conditions: list[Any] = []
        if self.after is not None:
            conditions.append(col(Job.id) < self.after)
        if self.before is not None:
            conditions.append(col(Job.id) > self.before)
        return conditions

    def taken(self, query: Any, order: Any = None) -> Any:
        """Return the query of the part of a list. The last jobs come oldest first."""
        order = col(Job.id) if order is None else order
        return query.order_by(order.asc() if self.from_end else order.desc()).limit(self.size)


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to list. Each field that is given must match; an empty tuple restricts nothing.

    `created_after` and `finished_after` include their time, `created_before` and `finished_before`
    do not. `error_code` is the code of a job's latest error. `search` is a job's id, its
    idempotency key, or words of the error of one of the 10,000 newest failed jobs; with
    `created_by`, of one among the 10,000 newest jobs of that creator.

    Of a wide range of the time of the end, a page stops early at 10,000 jobs of a status that
    finished at other times.
    """

    types: tuple[str, ...] = ()
    statuses: tuple[JobStatus, ...] = ()
    created_by: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    finished_after: datetime | None = None
    finished_before: datetime | None = None
    idempotency_key: str | None = None
    error_code: str | None = None
    search: str | None = None

    @property
    def is_simple(self) -> bool:
        """Whether only types and statuses are given."""
        return self == JobFilter(self.types, self.statuses)

    @property
    def is_of_finished(self) -> bool:
        """Whether a range of the time of the end is given."""
        return self.finished_after is not None or self.finished_before is not None

    @property
    def possible_statuses(self) -> tuple[JobStatus, ...]:
        """The statuses of the jobs that can match. Empty without a restriction, except for a range
        of the time of the end with statuses of jobs that have not ended."""
        if not self.is_of_finished:
            return self.statuses
        return tuple(each for each in self.statuses or FINAL if each in FINAL)


def owned_by(owner: Owner | None) -> list[Any]:
    """Return the condition that a job is the owner's; no condition for None."""
    if owner is None:
        return []
    # SQLAlchemy would write `created_by = NULL` as IS NULL.
    return [sqlalchemy.false() if owner.subject is None else col(Job.created_by) == owner.subject]


def filtered(
    wanted: JobFilter,
    owner: Owner | None,
    part: Slice,
    *,
    ahead: timedelta = timedelta(),
) -> Any:
    """Return the query of a page of jobs, as `Listed` has them.

    `ahead` is how far the database's clock has been advanced, in tests.
    """
    ranked = _ranked(wanted, owner)
    if ranked is not None:
        # Without a second condition of this field: the database would expect too few jobs.
        others = ranked.without(wanted)
        conditions = [*ranked.conditions, *_others(others, is_led=True), *_created(wanted)]
        within = _within(part, wanted, ahead)
        return _in_order(listed().where(*conditions), [(ranked.column, ranked.value)], within)
    leading = _leading(wanted, owner)
    conditions = [*leading, *owned_by(owner), *_others(wanted, is_led=bool(leading))]
    conditions += [*_created(wanted), *_created_ids(wanted, ahead), *part.conditions()]
    order: Any = col(Job.id)
    if not leading and wanted.is_of_finished:
        # No index has this order, so the database reads the index of the range.
        order = func.coalesce(order, order)
    return part.taken(listed().where(*conditions), order)


def widths(wanted: JobFilter, owner: Owner | None) -> Any:
    """Return the query of whether more than `WIDE_RANGE` jobs finished in a range of time, for each
    status that they can have. None: no such range is read."""
    if not wanted.is_of_finished or _leading(wanted, owner) or not wanted.possible_statuses:
        return None
    finished: Any = col(Job.finished_at)
    ranges = (
        sqlalchemy.select(finished)
        .where(col(Job.status) == str(status), *_between(finished, wanted))
        # Otherwise the database may expect to find so many soon without the index.
        .order_by(finished.desc())
        .limit(WIDE_RANGE + 1)
        .subquery()
        for status in wanted.possible_statuses
    )
    is_wide = (func.count() > WIDE_RANGE).label("is_wide")
    return union_all(*(sqlalchemy.select(is_wide).select_from(each) for each in ranges))


def walked(
    wanted: JobFilter, part: Slice, status: JobStatus, *, ahead: timedelta = timedelta()
) -> Any:
    """Return the query of the ids of jobs of a status, in the order of an index of ids, among
    `WALKED_JOBS` of it: those that finished in a range of time."""
    read = _walk(wanted, part, status, ahead, Job.id, Job.type, Job.created_at, Job.finished_at)
    rows = read.subquery()
    conditions = [*_between(col(Job.finished_at), wanted), *_created(wanted)]
    if wanted.types:
        conditions.append(col(Job.type).in_(wanted.types))
    # They stay in their order. To sort them, the database would have to read all of them.
    matching = (_as_of(rows, each) for each in conditions)
    return sqlalchemy.select(rows.c.id).where(*matching).limit(part.size)


def walk_end(
    wanted: JobFilter, part: Slice, status: JobStatus, *, ahead: timedelta = timedelta()
) -> Any:
    """Return the query of the id at which `walked` stops, if it stops before the end."""
    return _walk(wanted, part, status, ahead, Job.id).offset(WALKED_JOBS - 1).limit(1)


def _walk(
    wanted: JobFilter, part: Slice, status: JobStatus, ahead: timedelta, *columns: Any
) -> Any:
    within = replace(_within(part, wanted, ahead), size=WALKED_JOBS)
    if wanted.finished_before is not None and within.after is not None:
        # A job is enqueued before it ends.
        after = min(within.after, _first_id(wanted.finished_before + WALK_SLACK))
        within = replace(within, after=after)
    kind = [(col(Job.type), wanted.types[0])] if len(wanted.types) == 1 else []
    return _in_order(select(*columns), [*kind, (col(Job.status), str(status))], within)


def counted(
    wanted: JobFilter, owner: Owner | None, *, most: int, ahead: timedelta = timedelta()
) -> Any:
    """Return the query that counts jobs in ranges of an index, the newest `most` of each.

    It has a row per range; its columns are those of `CountedRange`.
    """
    ranges = _ranges(wanted, owner, ahead)
    return union_all(*(_counted(each, most) for each in ranges)) if ranges else None


def sampled(
    sample: Sample,
    wanted: JobFilter,
    ends: Sequence[Any],
    *,
    ahead: timedelta = timedelta(),
) -> Any:
    """Return the query that counts jobs of a sample: those `of_kind`, of the wanted types and
    statuses, and those of them that are `beyond` the ends of the ranges and match the filter.

    `ends` are those of the ranges of `counted`, in their order. None: the range was read whole.
    """
    beyond = [
        sqlalchemy.and_(*each.inside, each.order <= end, *each.matching)
        for each, end in zip(_ranges(wanted, None, ahead), ends, strict=True)
        if end is not None
    ]
    kind: list[Any] = []
    if wanted.types:
        kind.append(col(Job.type).in_(wanted.types))
    if statuses := wanted.possible_statuses:
        kind.append(col(Job.status).in_([str(each) for each in statuses]))
    return (
        sqlalchemy.select(
            func.count().label("of_kind"),
            func.coalesce(func.sum(_one_if(sample.of(sqlalchemy.or_(*beyond)))), 0).label("beyond"),
        )
        .select_from(sample.rows)
        .where(*sample.chosen, *map(sample.of, kind))
    )


def sampled_own(
    wanted: JobFilter,
    owner: Owner,
    end: Any,
    *,
    most: int,
    each: int,
    ahead: timedelta = timedelta(),
) -> Any:
    """Return the query that counts the owner's jobs beyond the end of what `counted` has read: how
    many there are, `most` at most, how many of these are in a sample, and how many of those match.

    The sample has one of `each` so many jobs. It is taken from the index of the owner's jobs, so it
    reveals nothing about the jobs of others.
    """
    (found,) = _ranges(wanted, owner, ahead)
    newest = (
        sqlalchemy.select(col(Job.id).label("id"))
        .where(*found.inside, found.order < end)
        .order_by(found.order.desc())
        .limit(most)
        .subquery()
    )
    place = func.row_number().over(order_by=newest.c.id.desc()).label("place")
    placed = sqlalchemy.select(newest.c.id, place).cte()
    chosen = sqlalchemy.select(placed.c.id).where(placed.c.place % each == 0)
    return sqlalchemy.select(
        sqlalchemy.select(func.count()).select_from(placed).scalar_subquery().label("jobs"),
        func.count().label("read"),
        func.coalesce(func.sum(_one_if(sqlalchemy.and_(*found.matching))), 0).label("matched"),
    ).where(col(Job.id).in_(chosen))


class Sample(NamedTuple):
    """Jobs that are chosen at random: `rows` of the table, with the conditions `chosen`."""

    rows: Any
    chosen: Sequence[Any] = ()

    def of(self, condition: Any) -> Any:
        """Return a condition of jobs as one of these rows."""
        return _as_of(self.rows, condition)


def _as_of(rows: Any, condition: Any) -> Any:
    """Return a condition of jobs as one of these rows, which have the same columns."""

    def replaced(element: Any, **_: Any) -> Any:
        return rows.c[element.key] if isinstance(element, sqlalchemy.Column) else None

    return replacement_traverse(condition, {}, replaced)


class _Range(NamedTuple):
    """A range of an index that has every job that is wanted, and others."""

    inside: list[Any]
    """The conditions of the range."""
    time: Any
    order: Any
    """The column that the index is read by, the highest value first."""
    matching: list[Any]
    """The other conditions."""


def _ranges(wanted: JobFilter, owner: Owner | None, ahead: timedelta) -> list[_Range]:
    leading = _leading(wanted, owner)
    matching = [
        sqlalchemy.true(),
        *owned_by(owner),
        *_others(wanted, is_led=True),
        *_created(wanted),
    ]
    ids = _created_ids(wanted, ahead)
    if leading or not wanted.is_of_finished:
        return [_Range([*leading, *ids], col(Job.created_at), col(Job.id), matching)]
    # A range of each status: no index has the jobs of several in the order of their end.
    finished = col(Job.finished_at)
    return [
        _Range(
            [col(Job.status) == str(status), *_between(finished, wanted)],
            finished,
            finished,
            [*matching, *ids],
        )
        for status in wanted.possible_statuses
    ]


def _counted(each: _Range, most: int) -> Any:
    """Return the query that counts the jobs in a range of an index, in its order."""
    read = (
        sqlalchemy.select(
            each.order.label("place"),
            each.time.label("time"),
            _one_if(sqlalchemy.and_(*each.matching)).label("one"),
        )
        .select_from(Job)
        .where(*each.inside)
        .order_by(each.order.desc())
        .limit(most)
        .cte()
    )
    # PostgreSQL before 18 has no min(uuid).
    end = sqlalchemy.select(read.c.place).order_by(read.c.place).limit(1).scalar_subquery()
    oldest = sqlalchemy.select(each.time).where(*each.inside).order_by(each.order.asc()).limit(1)
    is_full = func.count() >= most
    return sqlalchemy.select(
        func.count().label("read"),
        func.coalesce(func.sum(read.c.one), 0).label("matched"),
        func.coalesce(func.sum(read.c.one * _one_if(read.c.place == end)), 0).label("at_end"),
        sqlalchemy.case((is_full, end)).label("end"),
        func.max(read.c.time).label("newest"),
        func.min(read.c.time).label("last"),
        sqlalchemy.case((is_full, oldest.scalar_subquery())).label("oldest"),
    )


def _one_if(condition: Any) -> Any:
    return sqlalchemy.case((condition, 1), else_=0)


def _leading(wanted: JobFilter, owner: Owner | None) -> list[Any]:
    """Return the condition whose index is read; none if it is that of a time or of all jobs."""
    creator = owner.subject if owner is not None else wanted.created_by
    if wanted.search is not None:
        return [col(Job.id).in_(_found(wanted.search, creator))]
    if wanted.idempotency_key is not None:
        return [_has_key(wanted.idempotency_key)]
    if creator is not None:
        return [col(Job.created_by) == creator]
    if wanted.error_code is not None:
        return [_has_code(wanted.error_code)]
    return []


class _Ranked(NamedTuple):
    """The field of a filter whose index is read, and the expression that begins this index."""

    field: str
    column: Any
    value: str
    conditions: list[Any]
    """Those of the index, which is partial."""

    def without(self, wanted: JobFilter) -> JobFilter:
        """Return the other fields of a filter. An owner may ask for the jobs of another creator."""
        if self.field == "error_code":
            return replace(wanted, error_code=None)
        return replace(wanted, created_by=None) if wanted.created_by == self.value else wanted


def _ranked(wanted: JobFilter, owner: Owner | None) -> _Ranked | None:
    """Return the field whose index has the order of ids. None: no field has one."""
    creator = owner.subject if owner is not None else wanted.created_by
    if wanted.search is not None or wanted.idempotency_key is not None:
        return None
    if creator is not None:
        column: Any = col(Job.created_by)
        return _Ranked("created_by", column, creator, [column.is_not(None)])
    if wanted.error_code is not None and owner is None:
        given = col(Job.error).is_not(None)
        return _Ranked("error_code", error_code(), wanted.error_code, [given])
    return None


def _within(part: Slice, wanted: JobFilter, ahead: timedelta) -> Slice:
    """Return the part with the ends of the range of ids that jobs created then can have."""
    before, after = part.before or FIRST_ID, part.after or LAST_ID
    lowest, end = _id_range(wanted, ahead)
    if lowest is not None:
        before = max(before, uuid.UUID(int=max(0, lowest.int - 1)))
    if end is not None:
        after = min(after, end)
    return replace(part, before=before, after=after)


def _others(wanted: JobFilter, *, is_led: bool) -> list[Any]:
    """Return the conditions that need no index, if an index `is_led` by another one."""
    conditions: list[Any] = []
    kind: Any = col(Job.type)
    status: Any = col(Job.status)
    # The index of finishing times begins with the status.
    statuses = wanted.possible_statuses
    if wanted.is_of_finished:
        conditions += _between(_hidden(col(Job.finished_at), is_led), wanted)
        kind = _hidden(kind, True)
    if wanted.types:
        conditions.append(_hidden(kind, is_led).in_(wanted.types))
    if statuses or wanted.is_of_finished:
        conditions.append(_hidden(status, is_led).in_([str(each) for each in statuses]))
    if is_led:
        if wanted.created_by is not None:
            conditions.append(_hidden(col(Job.created_by), True) == wanted.created_by)
        if wanted.idempotency_key is not None:
            conditions.append(_hidden(col(Job.idempotency_key), True) == wanted.idempotency_key)
        if wanted.error_code is not None:
            conditions.append(_hidden(error_code(), True) == wanted.error_code)
    return conditions


def _hidden(column: Any, hide: bool) -> Any:
    """Return an expression with the value of a column that no index can serve."""
    return func.coalesce(column, column, type_=column.type) if hide else column


def _between(column: Any, wanted: JobFilter) -> list[Any]:
    bounds = []
    if wanted.finished_after is not None:
        bounds.append(column >= wanted.finished_after)
    if wanted.finished_before is not None:
        bounds.append(column < wanted.finished_before)
    return bounds


def _created(wanted: JobFilter) -> list[Any]:
    """Return the conditions of the time of creation. No index serves them: see `_created_ids`."""
    conditions: list[Any] = []
    if wanted.created_after is not None:
        conditions.append(col(Job.created_at) >= wanted.created_after)
    if wanted.created_before is not None:
        conditions.append(col(Job.created_at) < wanted.created_before)
    return conditions


def _created_ids(wanted: JobFilter, ahead: timedelta) -> list[Any]:
    """Return the conditions that an id is one that jobs created then can have."""
    lowest, end = _id_range(wanted, ahead)
    conditions: list[Any] = []
    if lowest is not None:
        conditions.append(col(Job.id) >= lowest)
    if end is not None:
        conditions.append(col(Job.id) < end)
    return conditions


def _id_range(wanted: JobFilter, ahead: timedelta) -> tuple[uuid.UUID | None, uuid.UUID | None]:
    """Return the lowest id that jobs created then can have, and the first one that is too high."""
    after, before = wanted.created_after, wanted.created_before
    return (
        None if after is None else _first_id(after - ID_SLACK - ahead),
        None if before is None else _first_id(before + ID_SLACK),
    )


def _first_id(time: datetime) -> uuid.UUID:
    """Return the lowest UUIDv7 of a time."""
    milliseconds = min(max(0, int(time.timestamp() * 1000)), 2**48 - 1)
    return uuid.UUID(int=milliseconds << 80)


def _has_key(key: str) -> Any:
    """Return the condition that a job has an idempotency key.

    The index of keys begins with the type, and `job_count` has every type that has jobs.
    """
    types = select(JobCount.type).distinct()
    return (col(Job.type).in_(types)) & (col(Job.idempotency_key) == key)


def _has_code(code: str) -> Any:
    return col(Job.error).is_not(None) & (error_code() == code)


def _found(text: str, creator: str | None) -> Any:
    """Return the query of the ids of the jobs that a search finds."""
    words = [_pattern(word) for word in text.split()]
    newest: Any = sqlalchemy.select(
        col(Job.id).label("id"),
        col(Job.status).label("status"),
        error_code().label("code"),
        error_message().label("message"),
    )
    if creator is None:
        # A range, and not an equality: only the index of status and id has this order. That of ids
        # would read every job in search of the failed ones.
        failed = str(JobStatus.FAILED)
        newest = newest.where(col(Job.status) >= failed, col(Job.status) <= failed)
        newest = newest.order_by(col(Job.status).desc(), col(Job.id).desc())
    else:
        newest = newest.where(col(Job.created_by) == creator).order_by(col(Job.id).desc())
    searched = newest.limit(SEARCHED_JOBS).subquery()
    said = func.coalesce(searched.c.code, "") + " " + func.coalesce(searched.c.message, "")
    by_words = sqlalchemy.select(searched.c.id).where(
        searched.c.status == str(JobStatus.FAILED),
        *(said.ilike(word, escape="\\") for word in words),
    )
    parts = [by_words, sqlalchemy.select(col(Job.id)).where(_has_key(text))]
    job_id = _uuid_of(text)
    if job_id is not None:
        parts.append(sqlalchemy.select(col(Job.id)).where(col(Job.id) == job_id))
    return sqlalchemy.select(union_all(*parts).subquery().c.id)


def _pattern(word: str) -> str:
    return "%" + re.sub(r"([\\%_])", r"\\\1", word) + "%"


def _uuid_of(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def unfiltered(types: Sequence[str], statuses: Sequence[JobStatus], part: Slice) -> Any:
    """Return the query of a page of one type, or of all, in the order of an index.

    With several statuses, the ids of each are read and merged, because no index has them in one
    order. Nor has one the jobs of a type whatever their status: each index makes every change of a
    job more expensive.
    """
    of_type = [(col(Job.type), name) for name in types]
    wanted = [str(each) for each in dict.fromkeys(statuses or (JobStatus if types else ()))]
    equal = [[*of_type, (col(Job.status), each)] for each in wanted] or [of_type]
    if len(equal) == 1 and not types:
        return _in_order(listed(), equal[0], part)
    # The ids of a type and a status are read first, because only their own index has these.
    found = union_all(
        *(_in_order(select(Job.id), each, part).subquery().select() for each in equal)
    ).subquery()
    ids = part.taken(sqlalchemy.select(found.c.id), found.c.id)
    return part.taken(listed().where(col(Job.id).in_(ids)))


def _in_order(query: Any, equal: Sequence[tuple[Any, str]], part: Slice) -> Any:
    """Return the query of a part of the jobs where expressions have these values.

    An index begins with the expressions and ends with the id. The last condition is a range of it
    and not an equality, so that the index of ids does not have the order. Otherwise the database
    reads all jobs in search of those that match, or sorts these, if it expects many or few.
    """
    if not equal:
        return part.taken(query.where(*part.conditions()))
    *others, (column, value) = equal

    def place(job_id: uuid.UUID) -> Any:
        return sqlalchemy.tuple_(
            sqlalchemy.literal(value, column.type), sqlalchemy.literal(job_id, sqlalchemy.Uuid())
        )

    ranked = sqlalchemy.tuple_(column, col(Job.id))
    query = query.where(
        *(each == wanted for each, wanted in others),
        ranked > place(part.before or FIRST_ID),
        ranked < place(part.after or LAST_ID),
    )
    return part.taken(query.order_by(column.asc() if part.from_end else column.desc()))


@lru_cache
def listed(values: tuple[str, ...] = JSON_VALUES) -> Any:
    """Return the query of jobs as `Listed` has them, with these JSON values."""
    chosen = columns(values)
    size: Any = sqlalchemy.literal(0, sqlalchemy.BigInteger)
    is_partial: Any = sqlalchemy.false()
    for index, name in enumerate(JobRecord._fields):
        if name in values:
            text = sqlalchemy.cast(chosen[index], sqlalchemy.Text)
            length: Any = func.coalesce(func.length(text), 0)
            size += length
            is_partial |= length > SMALL
            chosen[index] = sqlalchemy.case((length <= SMALL, chosen[index])).label(name)
    return sqlalchemy.select(*chosen, size.label("size"), is_partial.label("is_partial"))


def columns(values: tuple[str, ...]) -> list[Any]:
    """Return the columns of jobs, with null instead of the JSON values that are not wanted."""
    return [
        sqlalchemy.null().label(name)
        if name in JSON_VALUES and name not in values
        else col(getattr(Job, name))
        for name in JobRecord._fields
    ]
