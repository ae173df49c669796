"""What a release changes for stored jobs, older workers and older clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, Literal

from pydantic import JsonValue

from job_registry import compatibility
from job_registry.compatibility import Difference
from job_registry.lock import ReleasedType, ReleasedTypes

Schema = Mapping[str, Any]


class Outcome(StrEnum):
    """What a change means for those who use a job type."""

    SURVIVE = "survive"
    WAIT = "wait"
    """Nothing fails. The jobs stay queued until a newer worker takes them."""
    BREAK = "break"
    UNKNOWN = "unknown"
    """The schemas alone do not show it. It counts as a break."""

    @property
    def breaks(self) -> bool:
        """Whether the change must be assumed to break something."""
        return self in (Outcome.BREAK, Outcome.UNKNOWN)


class Level(StrEnum):
    """How serious a change is."""

    BREAKING = "breaking"
    WARNING = "warning"
    SAFE = "safe"


ChangeKind = Literal[
    "added", "removed", "renamed", "former_name", "payload", "default", "older_form", "handler",
    "policy",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between a released job type and the code.

    `path` is a JSON Pointer: into the payload if `kind` is "payload" or "default", into the policy
    if it is "policy", otherwise "". `before` and `after` are the two values; None means that there
    is none. `advice` says how to avoid the break.
    """

    job_type: str
    kind: ChangeKind
    path: str
    before: JsonValue
    after: JsonValue
    reason: str
    stored_jobs: Outcome = Outcome.SURVIVE
    older_workers: Outcome = Outcome.SURVIVE
    older_clients: Outcome = Outcome.SURVIVE
    advice: tuple[str, ...] = ()
    is_notable: bool = False
    """Whether it is a warning, although everything survives."""

    @property
    def level(self) -> Level:
        """How serious the change is: by the worst of its outcomes."""
        outcomes = (self.stored_jobs, self.older_workers, self.older_clients)
        if any(each.breaks for each in outcomes):
            return Level.BREAKING
        is_notable = self.is_notable or Outcome.WAIT in outcomes
        return Level.WARNING if is_notable else Level.SAFE


def changes_between(
    released: ReleasedTypes, current: ReleasedTypes, running: Mapping[str, int] | None = None
) -> list[Change]:
    """Return what has changed since the release, sorted by name.

    `running` is how many jobs of each type run now, if that is known, by the released or the
    current name.
    """
    running = running or {}
    names = {former: name for name, each in current.items() for former in each.former_names}
    names |= {name: name for name in current}
    added = current.keys() - released.keys() - {names.get(name) for name in released}
    changes = [
        Change(name, "added", "", None, name, "The job type is new.") for name in sorted(added)
    ]
    for name, before in released.items():
        found = names.get(name)
        if found is None:
            changes.append(_removed(name, before, {each: current[each] for each in added}))
            continue
        if found != name:
            changes.append(_renamed(name, found))
        now = max(running.get(name, 0), running.get(found, 0))
        changes += _changes_of(found, before, current[found], now)
        changes += _former_names(before, found, names, current)
    return sorted(
        changes, key=lambda change: (change.job_type, _ORDER.index(change.kind), change.path)
    )


_ORDER: Final[tuple[ChangeKind, ...]] = (
    "removed", "renamed", "former_name", "payload", "default", "older_form", "handler", "policy",
    "added",
)  # fmt: skip


def _removed(name: str, before: ReleasedType, added: ReleasedTypes) -> Change:
    alike = [
        each
        for each, released in sorted(added.items())
        if not _narrowings(before.payload_schema, released.payload_schema)
    ]
    advice = [
        f'If {each} is its new name, add former_names=["{name}"] to {each}.' for each in alike[:3]
    ]
    return Change(
        name, "removed", "", name, None,
        "The job type was removed, and no other has its name in former_names.",
        stored_jobs=Outcome.BREAK,
        older_clients=Outcome.BREAK,
        advice=(*advice, "Keep it until none of its jobs is queued and no client uses it."),
    )  # fmt: skip


def _renamed(name: str, found: str) -> Change:
    return Change(
        found, "renamed", "", name, found,
        f"The job type was {name}. Stored jobs and clients may go on using that name.",
        older_workers=Outcome.WAIT,
        advice=("Older workers do not know the new name; newer workers run its jobs.",),
    )  # fmt: skip


def _former_names(
    before: ReleasedType, found: str, names: Mapping[str, str], current: ReleasedTypes
) -> Iterator[Change]:
    for former in before.former_names:
        if former not in names:
            yield Change(
                found, "former_name", "", former, None,
                f"{former} is not a former name any more.",
                stored_jobs=Outcome.BREAK,
                older_clients=Outcome.BREAK,
                advice=(f'Keep former_names=["{former}"] until no job of this name is left.',),
            )  # fmt: skip
        elif names[former] != found:
            yield from _payload_changes(names[former], before, current[names[former]])


def _changes_of(
    name: str, before: ReleasedType, after: ReleasedType, running: int
) -> Iterator[Change]:
    yield from _payload_changes(name, before, after)
    yield from _older_forms(name, before, after)
    if before.has_handler and not after.has_handler:
        yield Change(
            name, "handler", "", True, False,
            "The job type has no handler any more. Its jobs wait for remote workers.",
            stored_jobs=Outcome.BREAK,
            advice=("Add the handler again. If remote workers run the jobs from now on, lock"
                    " the job types again.",),
        )  # fmt: skip
    yield from _policy_changes(name, before.policy, after.policy, running)


def _payload_changes(name: str, before: ReleasedType, after: ReleasedType) -> Iterator[Change]:
    was, is_ = before.payload_schema, after.payload_schema
    refused, unread = _narrowings(was, is_), _narrowings(is_, was)
    is_upgraded = _is_covered(was, [form.payload_schema for form in after.older_forms])
    is_accepted = _is_covered(
        was, [form.payload_schema for form in after.older_forms if form.accepted]
    )
    # An older worker may have the upgrade itself, if the release is undone.
    is_read = _is_covered(is_, [form.payload_schema for form in before.older_forms])
    parks = before.policy.get("onMismatch") == "PARK"
    for path in dict.fromkeys(each.path for each in (*refused, *unread)):
        here = [each for each in refused if each.path == path]
        back = [each for each in unread if each.path == path]
        breaks = _outcome(here)
        stored_jobs = Outcome.SURVIVE if is_upgraded else breaks
        older_clients = Outcome.SURVIVE if is_accepted else breaks
        older_workers = Outcome.SURVIVE if is_read else _outcome(back)
        if older_workers.breaks and parks:
            older_workers = Outcome.WAIT
        reasons = [each.reason for each in here]
        if not here:
            # `back` compares the other way round, and its reason is about that direction.
            here = [replace(each, before=each.after, after=each.before) for each in back]
            reasons = ["Older workers refuse a payload that uses the new form."]
        advice = [_FIRST_ADVICE.get(here[0].after, "")] if stored_jobs.breaks else []
        advice += _advice(name, stored_jobs, older_workers, older_clients)
        yield Change(
            name, "payload", path, here[0].before, here[0].after,
            " ".join(dict.fromkeys(reasons)),
            stored_jobs=stored_jobs,
            older_workers=older_workers,
            older_clients=older_clients,
            advice=tuple(filter(None, advice)),
        )  # fmt: skip
    for each in _changed_defaults(was, is_):
        yield Change(
            name, "default", each.path, each.before, each.after,
            each.reason,
            is_notable=True,
            advice=("Stored jobs and older clients that leave the field out get the new value.",),
        )  # fmt: skip


_FIRST_ADVICE: Final[Mapping[str, str]] = {
    "required": "Give the field a default.",
    "not a field": "Keep the field, optional, until no job has it and no client sends it.",
}
"""What keeps everything working, by what the code requires of a field now."""


def _older_forms(name: str, before: ReleasedType, after: ReleasedType) -> Iterator[Change]:
    """Yield the older forms that the release read or accepted, and the code does not."""
    read = [after.payload_schema, *(form.payload_schema for form in after.older_forms)]
    admitted = [
        after.payload_schema,
        *(form.payload_schema for form in after.older_forms if form.accepted),
    ]
    for form in before.older_forms:
        stored_jobs = _outcome_over(form.payload_schema, read)
        older_clients = (
            _outcome_over(form.payload_schema, admitted) if form.accepted else Outcome.SURVIVE
        )
        advice = tuple(_advice(name, stored_jobs, Outcome.SURVIVE, older_clients, form.model))
        if advice:
            yield Change(
                name, "older_form", "", form.model, None,
                f"The older form {form.model} is not {'read' if stored_jobs.breaks else 'accepted'}"
                " any more.",
                stored_jobs=stored_jobs,
                older_clients=older_clients,
                advice=advice,
            )  # fmt: skip


def _advice(
    name: str, stored: Outcome, workers: Outcome, clients: Outcome, model: str = "OldModel"
) -> Iterator[str]:
    variable = name.replace(".", "_")
    if stored.breaks:
        yield f"For stored jobs: upgrade the former model with @{variable}.upgrade({model})."
    if clients.breaks:
        yield f"For older clients: add {model} to accepts."
    if workers.breaks:
        yield (
            "For older workers: set on_mismatch to park, and release that first, or replace all"
            " workers before a client sends the new form."
        )


def _is_covered(schema: Schema, by: Iterable[Schema]) -> bool:
    """Return whether one of these schemas admits everything that `schema` admits."""
    return any(not _narrowings(schema, each) for each in by)


def _narrowings(was: Schema, is_: Schema) -> tuple[Difference, ...]:
    try:
        return compatibility.narrowings(was, is_)
    except _NOT_A_SCHEMA:
        reason = "The released schema is not a JSON Schema that can be compared."
        return (Difference("", "unknown", "unknown", reason, False),)


def _changed_defaults(was: Schema, is_: Schema) -> tuple[Difference, ...]:
    try:
        return compatibility.changed_defaults(was, is_)
    except _NOT_A_SCHEMA:
        return ()


_NOT_A_SCHEMA: Final = (TypeError, ValueError, AttributeError, LookupError)
"""What the comparison raises if a file or a server has something that is not a schema."""


def _outcome(differences: Iterable[Difference]) -> Outcome:
    found = [each.is_certain for each in differences]
    if not found:
        return Outcome.SURVIVE
    return Outcome.BREAK if any(found) else Outcome.UNKNOWN


def _outcome_over(schema: Schema, by: Iterable[Schema]) -> Outcome:
    """Return the best outcome for `schema` among the schemas that may admit it."""
    outcomes = {_outcome(_narrowings(schema, each)) for each in by}
    return next(
        each for each in (Outcome.SURVIVE, Outcome.UNKNOWN, Outcome.BREAK) if each in outcomes
    )


def settled_by_queue(changes: Iterable[Change], read: Mapping[str, int]) -> list[Change]:
    """Return the changes, decided by the payloads in the queue where the schemas do not decide.

    `read` is how many unfinished jobs were read, by the current job type, for the types of which no
    payload was refused. Without payloads nothing is known about clients.
    """
    return [
        _settled(change, read[change.job_type]) if change.job_type in read else change
        for change in changes
    ]


def _settled(change: Change, jobs: int) -> Change:
    stored, clients = change.stored_jobs, change.older_clients
    if stored is Outcome.UNKNOWN:
        stored = Outcome.SURVIVE
    if clients is Outcome.UNKNOWN and jobs:
        clients = Outcome.SURVIVE
    if (stored, clients) == (change.stored_jobs, change.older_clients):
        return change
    return replace(
        change,
        reason=f"{change.reason} The queue has {jobs:,} unfinished jobs of the type, and all are"
        " read.",
        stored_jobs=stored,
        older_clients=clients,
        advice=tuple(_advice(change.job_type, stored, change.older_workers, clients)),
        is_notable=True,
    )


def _policy_changes(
    name: str,
    before: Mapping[str, JsonValue],
    after: Mapping[str, JsonValue],
    running: int,
) -> Iterator[Change]:
    for field in sorted(after):
        # A release may lack fields that were added later.
        if field not in before or before[field] == after[field]:
            continue
        was, is_ = before[field], after[field]
        describe = _POLICY.get(field, _other) if type(was) in _KINDS.get(field, ()) else _other
        reason, is_notable = describe(was, is_, running)
        yield Change(name, "policy", f"/{field}", was, is_, reason, is_notable=is_notable)


def _limit(was: Any, is_: Any, running: int) -> tuple[str, bool]:
    if is_ is None or (was is not None and is_ > was):
        return "More jobs may run at once.", False
    if running > is_:
        return (
            f"Fewer jobs may run at once, and {running:,} run now. They run to their end, and no"
            f" other job of the type starts before fewer than {is_:,} run.",
            True,
        )
    return "Fewer jobs may run at once. It takes effect at once, also for queued jobs.", True


def _timeout(was: Any, is_: Any, _running: int) -> tuple[str, bool]:
    shorter = is_ < was
    return (
        f"Attempts may take {'less' if shorter else 'more'} time. It holds for jobs that are"
        " enqueued from now on; stored jobs keep the former timeout.",
        shorter,
    )


def _attempts(was: Any, is_: Any, _running: int) -> tuple[str, bool]:
    fewer = is_ < was
    return (
        f"Jobs have {'fewer' if fewer else 'more'} attempts. It holds for jobs that are enqueued"
        " from now on; stored jobs keep the former number.",
        fewer,
    )


def _backoff(_was: Any, _is: Any, _running: int) -> tuple[str, bool]:
    return (
        "The wait between attempts has changed. It holds for jobs that are enqueued from now on;"
        " stored jobs keep the former wait.",
        False,
    )


def _other(_was: Any, _is: Any, _running: int) -> tuple[str, bool]:
    return "The policy has changed.", True


def _mismatch(_was: Any, is_: Any, _running: int) -> tuple[str, bool]:
    if is_ == "PARK":
        return "A job whose stored payload cannot be read stays queued.", False
    return "A job whose stored payload cannot be read fails, and does not stay queued.", True


_POLICY: Final[Mapping[str, Callable[[Any, Any, int], tuple[str, bool]]]] = {
    "concurrencyLimit": _limit,
    "timeoutSeconds": _timeout,
    "maxAttempts": _attempts,
    "backoff": _backoff,
    "onMismatch": _mismatch,
}
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "concurrencyLimit": (int, type(None)),
    "timeoutSeconds": (int,),
    "maxAttempts": (int,),
    "backoff": (dict,),
    "onMismatch": (str,),
}
"""The types of the fields of a policy. A file may have other values there."""
