"""Which jobs to list, and the query of a page: each filter is served by an index.

Pages are in the order of ids, which is that of creation. The index is chosen here and not by the
database: the other conditions are written so that no index can serve them. So a page costs the same
on both databases, with and without statistics.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, NamedTuple

import sqlalchemy
from sqlalchemy import Text, func, union_all
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.visitors import replacement_traverse
from sqlmodel import col, select

from job_registry import Violation
from job_registry.errors import shortened
from job_registry_api.queue.errors import InputInvalid
from job_registry_api.queue.models import (
    FINAL,
    METADATA,
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
"""How many jobs of each status are read at most in search of those that finished in a range, and
how many of a creator or an error code in search of those that other fields want."""

WALK_SLACK: Final = timedelta(minutes=5)
"""The same as `ID_SLACK` for these searches, which read the jobs of this time as well."""

JSON_VALUES: Final = ("payload", "progress", "result", "error")
"""The columns of a job that may be large."""

SMALL: Final = 4_096
"""The length up to which the JSON values of a page are read together with its jobs."""

FIRST_ID: Final = uuid.UUID(int=0)
LAST_ID: Final = uuid.UUID(int=2**128 - 1)
"""Ids that no job has: lower and greater than those of all jobs."""


def check_owner(owner: object) -> None:
    """Check that an owner is one.

    Raises:
        InputInvalid: it is something else, such as the subject itself.
    """
    if owner is not None and not isinstance(owner, Owner):
        message = f"Expected an Owner; got {shortened(owner)}."
        raise InputInvalid((Violation("/owner", "wrong_type", message),))


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a list of jobs, newest first: `size` of the jobs that are older than the job
    `after` and newer than the job `before`. With `from_end` they are the last of these, not the
    first."""

    size: int
    after: uuid.UUID | None = None
    before: uuid.UUID | None = None
    from_end: bool = False

    def conditions(self, job_id: Any = None) -> list[Any]:
        """Return the conditions that a job is between the ends."""
        job_id = col(Job.id) if job_id is None else job_id
        conditions: list[Any] = []
        if self.after is not None:
            conditions.append(job_id < self.after)
        if self.before is not None:
            conditions.append(job_id > self.before)
        return conditions

    def taken(self, query: Any, order: Any = None) -> Any:
        """Return the query of the part of a list. The last jobs come oldest first."""
        order = col(Job.id) if order is None else order
        return query.order_by(order.asc() if self.from_end else order.desc()).limit(self.size)


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to list. Each field that is given must match; an empty tuple matches no jobs.

    `created_after` and `finished_after` include their time, `created_before` and `finished_before`
    do not. `error_code` is the code of a job's latest error. `search` is a job's id, its
    idempotency key, or words of the error of one of the 10,000 newest failed jobs; with
    `created_by`, of one among the 10,000 newest jobs of that creator.

    Of a wide range of the time of the end, a page stops early at 10,000 jobs of a status that
    finished at other times. With `created_by` or `error_code`, it stops early at 10,000 jobs of
    these that other fields do not want, unless at most 5,000 jobs have the types and statuses.
    """

    types: tuple[str, ...] | None = None
    statuses: tuple[JobStatus, ...] | None = None
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
    def is_of_kind(self) -> bool:
        """Whether only types, statuses and a range of the time of creation are given."""
        return self == replace(
            JobFilter(self.types, self.statuses),
            created_after=self.created_after,
            created_before=self.created_before,
        )

    @property
    def is_of_finished(self) -> bool:
        """Whether a range of the time of the end is given."""
        return self.finished_after is not None or self.finished_before is not None

    @property
    def possible_statuses(self) -> tuple[JobStatus, ...]:
        """The statuses of the jobs that can match. Empty without a restriction, except for a range
        of the time of the end with statuses of jobs that have not ended."""
        if not self.is_of_finished:
            return self.statuses or ()
        return tuple(each for each in self.statuses or FINAL if each in FINAL)


def owned_by(owner: Owner | None) -> list[Any]:
    """Return the condition that a job is the owner's; no condition for None."""
    if owner is None:
        return []
    # SQLAlchemy would write `created_by = NULL` as IS NULL.
    if owner.subject is None:
        return [sqlalchemy.false()]
    return [_hidden(col(Job.created_by), True) == owner.subject]


def ordered(wanted: JobFilter, owner: Owner | None, part: Slice) -> Any:
    """Return the query of a page of jobs, as `Listed` has them, in the order of an index.

    None: no index has the order. The part is `narrowed`.
    """
    lead = _lead(wanted, owner)
    if lead is not None and lead.equal:
        conditions = [*lead.conditions, *_others(lead.others, is_led=True), *_created(wanted)]
        return _page(listed().where(*conditions), lead.equal, part)
    statuses = wanted.possible_statuses
    if owner is not None or not wanted.is_of_kind or wanted.types or len(statuses) > 1:
        return None
    of_status = [(col(Job.status), str(each)) for each in statuses]
    return _page(listed().where(*_created(wanted)), of_status, part)


def merged(wanted: JobFilter, part: Slice) -> Any:
    """Return the query of the ids of a page of jobs of several statuses: those of each status in
    the order of its index."""
    each_in_order = (
        _page(select(Job.id).where(*_created(wanted)), [(col(Job.status), str(status))], part)
        .subquery()
        .select()
        for status in wanted.possible_statuses
    )
    ids = union_all(*each_in_order).subquery().c.id
    return part.taken(sqlalchemy.select(ids), ids)


def found(wanted: JobFilter, owner: Owner | None, part: Slice) -> Any:
    """Return the query of a page of jobs that are few, and sorted: those with a key, and those that
    finished in a narrow range of time."""
    lead = _lead(wanted, owner)
    conditions = [*lead.conditions] if lead is not None else []
    conditions += [*owned_by(owner), *_others(wanted, is_led=lead is not None), *_created(wanted)]
    # No index has this order, so the database reads that of the conditions.
    order = _hidden(col(Job.id), True)
    return part.taken(listed().where(*conditions, *part.conditions(order)), order)


def searched(wanted: JobFilter, owner: Owner | None, part: Slice) -> Any:
    """Return the query of the ids of a page of jobs whose error has the words of the search, of the
    `SEARCHED_JOBS` newest ones. The part is `narrowed`."""
    creator = owner.subject if owner is not None else wanted.created_by
    newest: Any = sqlalchemy.select(*METADATA.tables["job"].c)
    newest = newest.where(*Slice(0, LAST_ID, FIRST_ID).conditions())
    if creator is None:
        newest = _in_order(newest, [(col(Job.status), str(JobStatus.FAILED))])
    else:
        newest = newest.where(col(Job.created_by).is_not(None))
        newest = _in_order(newest, [(col(Job.created_by), creator)])
    rows = newest.limit(SEARCHED_JOBS).subquery()
    said = func.coalesce(error_code(), "") + " " + func.coalesce(error_message(), "")
    conditions = [
        col(Job.status) == str(JobStatus.FAILED),
        *(said.ilike(_pattern(word), escape="!") for word in (wanted.search or "").split()),
        *_remaining(wanted, owner, part),
    ]
    matching = (_as_of(rows, each) for each in conditions)
    return part.taken(sqlalchemy.select(rows.c.id).where(*matching), rows.c.id)


def identified(wanted: JobFilter, owner: Owner | None, part: Slice) -> Any:
    """Return the query of the ids of the jobs whose id or key is the text of the search."""
    text = wanted.search or ""
    is_it = [_has_key(text)]
    if (job_id := _uuid_of(text)) is not None:
        is_it.append(col(Job.id) == job_id)
    remaining = _remaining(wanted, owner, part)
    return union_all(*(select(Job.id).where(each, *remaining) for each in is_it))


def _remaining(wanted: JobFilter, owner: Owner | None, part: Slice) -> list[Any]:
    """Return the conditions of the other fields, in a form that no index can serve."""
    between = part.conditions(_hidden(col(Job.id), True))
    return [*owned_by(owner), *_others(wanted, is_led=True), *_created(wanted), *between]


def widths(wanted: JobFilter, owner: Owner | None) -> Any:
    """Return the query of whether more than `WIDE_RANGE` jobs finished in a range of time, for each
    status that they can have. None: no such range is read."""
    if not wanted.is_of_finished or _lead(wanted, owner) or not wanted.possible_statuses:
        return None
    finished: Any = col(Job.finished_at)
    ranges = (
        _in_order(
            sqlalchemy.select(finished).where(*_finished(finished, wanted)),
            [(col(Job.status), str(status))],
            finished,
        )
        .limit(WIDE_RANGE + 1)
        .subquery()
        for status in wanted.possible_statuses
    )
    is_wide = (func.count() > WIDE_RANGE).label("is_wide")
    return union_all(*(sqlalchemy.select(is_wide).select_from(each) for each in ranges))


class Walk(NamedTuple):
    """Jobs that are read in the order of an index of ids, in search of those that are wanted."""

    equal: list[tuple[Any, str]]
    """The expressions that the index begins with, and their values."""
    conditions: list[Any]
    """The condition of the index."""
    within: Slice
    matching: list[Any]
    """The conditions of the wanted jobs."""
    compared: list[Any]
    """The columns of these conditions. SQLite reads all that it is given, of all jobs."""

    def read(self, *columns: Any) -> Any:
        """Return the query of the first `WALKED_JOBS` jobs."""
        return _page(select(*columns).where(*self.conditions), self.equal, self.within)


def is_sifted(wanted: JobFilter, owner: Owner | None) -> bool:
    """Return whether a page is a part of the jobs of a creator or an error code."""
    lead = _lead(wanted, owner)
    return lead is not None and bool(lead.equal) and bool(_others(lead.others, is_led=True))


def walks(
    wanted: JobFilter, owner: Owner | None, part: Slice, *, by_error: bool, ahead: timedelta
) -> list[Walk]:
    """Return where to look for jobs: among those of a creator or an error code or, for a range of
    the time of the end, among those of each status. `by_error` prefers the error code."""
    within = replace(narrowed(part, wanted, ahead), size=WALKED_JOBS)
    if wanted.finished_before is not None:
        # A job is enqueued before it ends.
        end = _first_id(wanted.finished_before + WALK_SLACK)
        within = replace(within, after=min(within.after or end, end))
    compared: list[Any] = [Job.id, Job.type, Job.status, Job.created_at, Job.finished_at]
    if (lead := _lead(wanted, owner, by_error=by_error)) is not None:
        compared.append(Job.created_by)
        matching = [*owned_by(owner), *_others(lead.others, is_led=True), *_created(wanted)]
        if lead.others.error_code is not None:
            compared.append(Job.error)
        return [Walk(lead.equal, lead.conditions, within, matching, compared)]
    matching = [*_finished(col(Job.finished_at), wanted), *_created(wanted)]
    if wanted.types:
        matching.append(col(Job.type).in_(wanted.types))
    kind = [(col(Job.type), wanted.types[0])] if wanted.types and len(wanted.types) == 1 else []
    return [
        Walk([*kind, (col(Job.status), str(status))], [], within, matching, compared)
        for status in wanted.possible_statuses
    ]


def walked(walk: Walk, size: int) -> Any:
    """Return the query of the ids of the first `size` wanted jobs among those of a walk."""
    rows = walk.read(*walk.compared).subquery()
    # They stay in their order. To sort them, the database would have to read all of them.
    matching = (_as_of(rows, each) for each in walk.matching)
    return sqlalchemy.select(rows.c.id).where(*matching).limit(size)


def walk_end(walk: Walk) -> Any:
    """Return the query of the id at which a walk stops, if it stops before the end."""
    return walk.read(Job.id).offset(WALKED_JOBS - 1).limit(1)


def among(ids: Sequence[uuid.UUID], wanted: JobFilter, owner: Owner | None, part: Slice) -> Any:
    """Return the query of a page of the wanted jobs among those with these ids."""
    return part.taken(listed().where(col(Job.id).in_(ids), *_remaining(wanted, owner, part)))


def counted(
    wanted: JobFilter, owner: Owner | None, *, most: int, ahead: timedelta = timedelta()
) -> Any:
    """Return the query that counts jobs in ranges of an index, the newest `most` of each.

    It has a row per range; its columns are those of `CountedRange`.
    """
    ranges = _ranges(wanted, owner, ahead)
    return union_all(*(_counted(each, most) for each in ranges)) if ranges else None


def sampled(sample: Sample, wanted: JobFilter, ends: Sequence[Any], *, ahead: timedelta) -> Any:
    """Return the query that counts jobs of a sample: those `of_kind`, of the wanted types and
    statuses, and those of them that are `beyond` the ends of the ranges and match the filter.

    `ends` are those of the ranges of `counted`, in their order. None: the range was read whole.
    """
    beyond = [
        sqlalchemy.and_(*each.has(), each.order <= end, *each.matching)
        for each, end in zip(_ranges(wanted, None, ahead), ends, strict=True)
        if end is not None
    ]
    kind: list[Any] = []
    if wanted.types:
        kind.append(_hidden(col(Job.type), True).in_(wanted.types))
    if statuses := wanted.possible_statuses:
        kind.append(_hidden(col(Job.status), True).in_([str(each) for each in statuses]))
    return (
        sqlalchemy.select(
            func.count().label("of_kind"),
            func.coalesce(func.sum(_one_if(sample.of(sqlalchemy.or_(*beyond)))), 0).label("beyond"),
        )
        .select_from(sample.rows)
        .where(*sample.chosen, *map(sample.of, kind))
    )


def sampled_own(
    wanted: JobFilter, owner: Owner, end: Any, *, most: int, each: int, ahead: timedelta
) -> Any:
    """Return the query that counts the owner's jobs beyond the end of what `counted` has read: how
    many there are, `most` at most, how many of these are in a sample, and how many of those match.

    The sample has one of `each` so many jobs. It is taken from the index of the owner's jobs, so it
    reveals nothing about the jobs of others.
    """
    (found,) = _ranges(wanted, owner, ahead)
    newest = found.read(col(Job.id).label("id")).where(found.order < end).limit(most).subquery()
    place = func.row_number().over().label("place")
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

    equal: list[tuple[Any, str]]
    """The expressions that the index begins with, and their values."""
    inside: list[Any]
    """The conditions of the range."""
    time: Any
    order: Any
    """The column that the index is read by, the highest value first."""
    matching: list[Any]
    """The other conditions."""

    def read(self, *columns: Any, from_end: bool = False) -> Any:
        """Return the query of the jobs in the range, in its order."""
        query = sqlalchemy.select(*columns).select_from(Job).where(*self.inside)
        return _in_order(query, self.equal, self.order, from_end=from_end)

    def has(self) -> list[Any]:
        """Return the conditions that a job is in the range."""
        return [*(column == value for column, value in self.equal), *self.inside]


def _ranges(wanted: JobFilter, owner: Owner | None, ahead: timedelta) -> list[_Range]:
    lead = _lead(wanted, owner)
    others = wanted if lead is None else lead.others
    matching = [
        sqlalchemy.true(),
        *owned_by(owner),
        *_others(others, is_led=True),
        *_created(wanted),
    ]
    # The jobs that have a key are few, and sorted.
    order = _hidden(col(Job.id), lead is not None and not lead.equal)
    ids = narrowed(Slice(0), wanted, ahead).conditions(order)
    if lead is not None:
        inside = [*lead.conditions, *ids]
        return [_Range(lead.equal, inside, col(Job.created_at), order, matching)]
    if not wanted.is_of_finished:
        return [_Range([], ids, col(Job.created_at), col(Job.id), matching)]
    # A range of each status: no index has the jobs of several in the order of their end.
    finished = col(Job.finished_at)
    inside = _finished(finished, wanted)
    return [
        _Range([(col(Job.status), str(status))], inside, finished, finished, [*matching, *ids])
        for status in wanted.possible_statuses
    ]


def _counted(each: _Range, most: int) -> Any:
    """Return the query that counts the jobs in a range of an index, in its order."""
    read = (
        each.read(
            each.order.label("place"),
            each.time.label("time"),
            _one_if(sqlalchemy.and_(*each.matching)).label("one"),
        )
        .limit(most)
        .cte()
    )
    # PostgreSQL before 18 has no min(uuid).
    end = sqlalchemy.select(read.c.place).order_by(read.c.place).limit(1).scalar_subquery()
    oldest = each.read(each.time, from_end=True).limit(1)
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


class _Lead(NamedTuple):
    """The field of a filter whose index is read."""

    equal: list[tuple[Any, str]]
    """The expression that the index begins with, and its value. Empty for a key, which few jobs
    have."""
    conditions: list[Any]
    others: JobFilter
    """The other fields."""


def _lead(wanted: JobFilter, owner: Owner | None, *, by_error: bool = False) -> _Lead | None:
    """Return the field whose index is read. None: that of a time, of the statuses or of all ids."""
    creator = owner.subject if owner is not None else wanted.created_by
    if wanted.idempotency_key is not None:
        return _Lead([], [_has_key(wanted.idempotency_key)], wanted)
    if creator is not None and not (by_error and wanted.error_code is not None):
        column: Any = col(Job.created_by)
        # An owner may ask for the jobs of another creator.
        others = replace(wanted, created_by=None) if wanted.created_by == creator else wanted
        return _Lead([(column, creator)], [column.is_not(None)], others)
    if wanted.error_code is not None:
        given, others = col(Job.error).is_not(None), replace(wanted, error_code=None)
        return _Lead([(error_code(), wanted.error_code)], [given], others)
    return None


def narrowed(part: Slice, wanted: JobFilter, ahead: timedelta) -> Slice:
    """Return the part with the ends of the range of ids that jobs created then can have.

    It always has both ends. With fewer, SQLite reads all jobs in the order of ids in search of a
    value that most values are more frequent than.
    """
    before, after = part.before or FIRST_ID, part.after or LAST_ID
    if wanted.created_after is not None:
        lowest = _first_id(wanted.created_after - ID_SLACK - ahead)
        before = max(before, uuid.UUID(int=max(0, lowest.int - 1)))
    if wanted.created_before is not None:
        after = min(after, _first_id(wanted.created_before + ID_SLACK))
    return replace(part, before=before, after=after)


def _others(wanted: JobFilter, *, is_led: bool) -> list[Any]:
    """Return the conditions that need no index, if an index `is_led` by another one."""
    conditions: list[Any] = []
    kind: Any = col(Job.type)
    status: Any = col(Job.status)
    # The index of finishing times begins with the status.
    statuses = wanted.possible_statuses
    if wanted.is_of_finished:
        conditions += _finished(_hidden(col(Job.finished_at), is_led), wanted)
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


def _finished(column: Any, wanted: JobFilter) -> list[Any]:
    return _between(column, wanted.finished_after, wanted.finished_before)


def _created(wanted: JobFilter) -> list[Any]:
    """Return the conditions of the time of creation. No index serves them: see `narrowed`."""
    return _between(col(Job.created_at), wanted.created_after, wanted.created_before)


def _between(column: Any, after: datetime | None, before: datetime | None) -> list[Any]:
    conditions = []
    if after is not None:
        conditions.append(column >= after)
    if before is not None:
        conditions.append(column < before)
    return conditions


def _first_id(time: datetime) -> uuid.UUID:
    """Return the lowest UUIDv7 of a time."""
    milliseconds = min(max(0, int(time.timestamp() * 1000)), 2**48 - 1)
    return uuid.UUID(int=milliseconds << 80)


def _has_key(key: str) -> Any:
    """Return the condition that a job has an idempotency key.

    The index of keys begins with the type, and `job_count` has every type that has jobs.
    """
    types = select(JobCount.type).distinct().scalar_subquery()
    return sqlalchemy.and_(_is_in(col(Job.type), types), col(Job.idempotency_key) == key)


def _pattern(word: str) -> str:
    # Not by a backslash, which PostgreSQL reads in two ways: see `standard_conforming_strings`.
    return "%" + re.sub(r"([!%_])", r"!\1", word) + "%"


def _uuid_of(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def _page(query: Any, equal: Sequence[tuple[Any, str]], part: Slice) -> Any:
    """Return the query of a part of the jobs where expressions have these values."""
    query = query.where(*part.conditions())
    return _in_order(query, equal, from_end=part.from_end).limit(part.size)


def _in_order(
    query: Any,
    equal: Sequence[tuple[Any, str]],
    column: Any = None,
    *,
    from_end: bool = False,
) -> Any:
    """Return the query of the jobs where expressions have these values, in the order of a column:
    that of ids, if it is None.

    An index begins with the expressions and goes on with the column. Conditions of a range of the
    column begin and end the search in it. SQLite is given the index of statuses and that of types:
    which one it chooses depends on its version and on the statistics, and another one has all jobs
    of a status, or all there are.
    """
    last: Any = col(Job.id) if column is None else column
    order = last.asc() if from_end else last.desc()
    if equal:
        (first, value), *others = equal
        query = query.where(first == _any_of(value), *(each == wanted for each, wanted in others))
        order = _order(first.asc() if from_end else first.desc(), order)
        names = tuple(getattr(each, "key", None) for each, _ in equal)
        if column is None and (index := _INDEXES.get(names)) is not None:
            query = query.with_hint(METADATA.tables["job"], f"INDEXED BY {index}", "sqlite")
    return query.order_by(order)


_INDEXES: Final[Mapping[tuple[str | None, ...], str]] = {
    ("status",): "job_by_status",
    ("type", "status"): "job_by_type_and_status",
}
"""The indexes that begin with these columns and go on with the id."""


class _any_of(FunctionElement[str]):  # noqa: N801 - a function of SQL
    """The value of an expression, by which an index is read in its order.

    On PostgreSQL it is one of an array, so that the expression counts for the order of the query,
    and no other index has this order. With an equality, the database reads all jobs in the order of
    ids in search of those that match, if it expects many. A comparison of rows would not end a
    search at its second value (PostgreSQL 17 and older). SQLite prefers the index of an equality.
    """

    inherit_cache = True
    type = Text()

    def __init__(self, value: str) -> None:
        super().__init__(sqlalchemy.literal(value, Text()))


@compiles(_any_of)
def _one_of_array(element: _any_of, compiler: SQLCompiler, **options: Any) -> str:
    return f"ANY (ARRAY[{compiler.process(element.clauses, **options)}])"


@compiles(_any_of, "sqlite")
def _only_value(element: _any_of, compiler: SQLCompiler, **options: Any) -> str:
    return compiler.process(element.clauses, **options)


class _order(FunctionElement[Any]):  # noqa: N801 - a function of SQL
    """The order of an index that begins with an expression and goes on with a column. SQLite needs
    the column alone: it would sort by an expression, though it has one value."""

    inherit_cache = True


@compiles(_order)
def _whole_order(element: _order, compiler: SQLCompiler, **options: Any) -> str:
    return compiler.process(element.clauses, **options)


@compiles(_order, "sqlite")
def _order_of_column(element: _order, compiler: SQLCompiler, **options: Any) -> str:
    _, column = element.clauses
    return compiler.process(column, **options)


class _is_in(FunctionElement[Any]):  # noqa: N801 - a function of SQL
    """Whether a column has one of the values of a query. PostgreSQL reads these first, so that it
    does not join all jobs with them."""

    inherit_cache = True


@compiles(_is_in)
def _in_array(element: _is_in, compiler: SQLCompiler, **options: Any) -> str:
    column, values = (compiler.process(each, **options) for each in element.clauses)
    return f"{column} = ANY (ARRAY{values})"


@compiles(_is_in, "sqlite")
def _in_rows(element: _is_in, compiler: SQLCompiler, **options: Any) -> str:
    column, values = (compiler.process(each, **options) for each in element.clauses)
    return f"{column} IN {values}"


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
