"""Payloads that change: upgrades from older models, accepted older forms, and former names."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict

from job_registry import (
    Backoff,
    DefinitionError,
    JobPolicy,
    JobRegistry,
    JobType,
    JobTypeNotFound,
    Payload,
    PayloadInvalid,
)
from job_registry.evolution import changes_between
from job_registry.lock import released_types


class MailSendV1(Payload):
    address: str


class MailSendV2(Payload):
    to: str


class MailSend(Payload):
    to: list[str]
    urgent: bool = False


class Lax(Payload):
    model_config = ConfigDict(extra="allow")


def mail_send(**options: Any) -> JobType[MailSend]:
    """`mail.send`, with upgrades from both older models."""
    job_type = JobType(name="mail.send", payload=MailSend, **options)

    @job_type.upgrade(MailSendV1)
    def from_v1(older: MailSendV1) -> MailSendV2:
        if older.address == "nobody":
            raise KeyError("no such address")
        return MailSendV2(to=older.address)

    @job_type.upgrade(MailSendV2)
    def from_v2(older: MailSendV2) -> MailSend:
        return MailSend(to=[older.to])

    return job_type


def test_a_stored_payload_of_any_version_is_read_as_today() -> None:
    registry = JobRegistry([mail_send()])
    for stored in ('{"address": "ada"}', '{"to": "ada"}', b'{"to": ["ada"]}'):
        assert registry.read("mail.send", stored) == MailSend(to=["ada"])


def test_a_stored_payload_of_no_version_is_refused_with_the_faults_of_today() -> None:
    registry = JobRegistry([mail_send()])
    with pytest.raises(PayloadInvalid) as refused:
        registry.read("mail.send", '{"receiver": "ada"}')
    assert [(v.path, v.code) for v in refused.value.violations] == [
        ("/receiver", "unknown_field"),
        ("/to", "required"),
    ]
    with pytest.raises(JobTypeNotFound):
        registry.read("mail.sent", "{}")


def test_an_upgrade_that_raises_is_a_payload_that_does_not_fit() -> None:
    registry = JobRegistry([mail_send()])
    with pytest.raises(PayloadInvalid) as refused:
        registry.read("mail.send", '{"address": "nobody"}')
    first = refused.value.violations[0]
    assert (first.path, first.code) == ("", "upgrade_failed")
    assert first.message == (
        "The payload fits MailSendV1, an older form of mail.send, and its upgrade failed."
    )
    assert "KeyError" not in str(refused.value)
    assert isinstance(refused.value.__cause__, KeyError)


def test_an_upgrade_that_returns_something_else_is_a_payload_that_does_not_fit() -> None:
    job_type = JobType(name="mail.send", payload=MailSend)
    wrong: Any = lambda older: {"to": [older.address]}  # noqa: E731
    job_type.upgrade(MailSendV1)(wrong)
    with pytest.raises(PayloadInvalid, match="its upgrade failed"):
        JobRegistry([job_type]).read("mail.send", '{"address": "ada"}')


def test_an_upgrade_without_annotations_returns_the_payload_of_today() -> None:
    job_type = JobType(name="mail.send", payload=MailSend)
    job_type.upgrade(MailSendV2)(lambda older: MailSend(to=[older.to]))
    assert job_type.read('{"to": "ada"}') == MailSend(to=["ada"])


def test_an_upgrade_can_return_a_model_that_is_defined_in_a_function() -> None:
    class Today(Payload):
        count: int

    class Before(Payload):
        number: int

    class First(Payload):
        amount: int

    job_type = JobType(name="a", payload=Today)

    @job_type.upgrade(First)
    def from_first(older: First) -> Before:
        return Before(number=older.amount)

    @job_type.upgrade(Before)
    def from_before(older: Before) -> Today:
        return Today(count=older.number)

    assert JobRegistry([job_type]).read("a", '{"amount": 3}') == Today(count=3)


def upgrade(older: Any, function: Callable[[Any], Any]) -> Callable[[JobType[MailSend]], None]:
    def apply(job_type: JobType[MailSend]) -> None:
        job_type.upgrade(older)(function)

    return apply


def to_v1(older: MailSendV2) -> MailSendV1:
    return MailSendV1(address=older.to)


def to_v2(older: MailSendV1) -> MailSendV2:
    return MailSendV2(to=older.address)


def to_today(older: MailSendV2) -> MailSend:
    return MailSend(to=[older.to])


def to_a_dict(older: MailSendV2) -> dict[str, Any]:
    return {"to": [older.to]}


async def later(older: MailSendV2) -> MailSend:
    return MailSend(to=[older.to])


def of_two(older: MailSendV2, other: MailSendV2) -> MailSend:
    return MailSend(to=[older.to, other.to])


def generated(older: MailSendV2) -> Iterator[MailSend]:
    yield MailSend(to=[older.to])


async def generated_later(older: MailSendV2) -> AsyncIterator[MailSend]:
    yield MailSend(to=[older.to])


def to_an_int(older: MailSendV2) -> int:
    return len(older.to)


WRONG_STEPS: list[tuple[list[tuple[Any, Any]], str]] = [
    ([(dict, to_today)], "upgrade\\(dict\\), expected a subclass of Payload"),
    ([(MailSend, to_today)], "upgrade\\(MailSend\\) is of the payload itself"),
    ([(Lax, to_today)], "older payload Lax sets extra='allow'"),
    ([(MailSendV2, to_today)] * 2, "there is an upgrade from MailSendV2 already, .*to_today"),
    ([(MailSendV2, to_a_dict)], "to_a_dict is annotated to return .*expected a subclass"),
    ([(MailSendV2, to_an_int)], "to_an_int is annotated to return .*expected a subclass"),
    ([(MailSendV2, later)], "later must be a plain function"),
    ([(MailSendV2, generated)], "generated must be a plain function"),
    ([(MailSendV2, generated_later)], "generated_later must be a plain function"),
    ([(MailSendV2, of_two)], "of_two must take one argument"),
    ([(MailSendV1, to_v1)], "to_v1 returns MailSendV1, the model that it upgrades from"),
    ([(MailSendV1, to_v2)], "returns MailSendV2, which is neither the payload MailSend nor"),
    (
        [(MailSendV1, to_v2), (MailSendV2, to_v1)],
        "form a cycle, from MailSendV1 to MailSendV2 to MailSendV1, and never reach",
    ),
]


@pytest.mark.parametrize(("steps", "message"), WRONG_STEPS)
def test_a_wrong_upgrade_stops_the_start(steps: list[Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=f"job type mail.send: .*{message}"):
        JobRegistry([with_steps(steps)])


def with_steps(steps: list[Any]) -> JobType[MailSend]:
    job_type = JobType(name="mail.send", payload=MailSend)
    for older, function in steps:
        upgrade(older, function)(job_type)
    return job_type


def test_a_fingerprint_without_upgrades_is_that_of_the_schema() -> None:
    job_type = JobType(name="mail.send", payload=MailSend)
    assert job_type.fingerprint == job_type.payload_fingerprint
    assert job_type.readable_fingerprints == (job_type.payload_fingerprint,)


def test_an_upgrade_changes_the_fingerprint_and_not_that_of_the_payload() -> None:
    plain = JobType(name="mail.send", payload=MailSend)
    one = JobType(name="mail.send", payload=MailSend)
    assert one.fingerprint == plain.fingerprint
    upgrade(MailSendV2, to_today)(one)
    both = mail_send()
    assert len({plain.fingerprint, one.fingerprint, both.fingerprint}) == 3
    assert plain.payload_fingerprint == one.payload_fingerprint == both.payload_fingerprint
    older = [JobType(name="a", payload=model).fingerprint for model in (MailSendV2, MailSendV1)]
    assert both.readable_fingerprints == (both.payload_fingerprint, *older)


def test_a_form_that_is_not_accepted_is_refused_at_the_door() -> None:
    with pytest.raises(PayloadInvalid) as refused:
        JobRegistry([mail_send()]).admit("mail.send", {"address": "ada"})
    assert [v.path for v in refused.value.violations] == ["/address", "/to"]


def test_a_form_that_is_accepted_is_stored_as_it_came() -> None:
    job_type = mail_send(accepts=[MailSendV1])
    registry = JobRegistry([job_type])
    admitted = registry.admit("mail.send", {"address": "ada"})
    assert admitted.json == b'{"address":"ada"}'
    assert admitted.payload == MailSend(to=["ada"])
    assert admitted.fingerprint == JobType(name="a", payload=MailSendV1).fingerprint
    today = registry.admit("mail.send", {"to": ["ada"]})
    assert today.fingerprint == job_type.payload_fingerprint
    with pytest.raises(PayloadInvalid):
        registry.admit("mail.send", {"to": "ada"})


def test_an_accepted_form_whose_upgrade_fails_is_refused_at_the_door() -> None:
    registry = JobRegistry([mail_send(accepts=[MailSendV1])])
    with pytest.raises(PayloadInvalid) as refused:
        registry.admit("mail.send", {"address": "nobody"})
    assert [v.code for v in refused.value.violations] == ["upgrade_failed"]


def test_an_instance_of_an_accepted_model_is_a_request_for_its_type() -> None:
    registry = JobRegistry([mail_send(accepts=[MailSendV1])])
    request = registry.request(MailSendV1(address="ada"))
    assert (request.type, request.payload) == ("mail.send", {"address": "ada"})
    with pytest.raises(DefinitionError, match="no job type of this registry has"):
        registry.request(MailSendV2(to="ada"))


@pytest.mark.parametrize(
    ("accepts", "message"),
    [
        ([dict], "accepts\\[0\\] is dict, expected a subclass of Payload"),
        ([MailSend], "accepts has MailSend, the payload itself"),
        ([MailSendV1, MailSendV1], "accepts has MailSendV1 twice"),
        ([Lax], "older payload Lax sets extra='allow'"),
        ("MailSendV1", "expected a list of payloads"),
        ([MailSendV1], "accepts MailSendV1, from which no upgrade leads to MailSend"),
    ],
)
def test_wrong_accepted_models_stop_the_start(accepts: Any, message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        JobRegistry([JobType(name="mail.send", payload=MailSend, accepts=accepts)])


def test_a_former_name_leads_to_the_type() -> None:
    job_type = JobType(name="mail.send", payload=MailSend, former_names=["mail.sent", "mail"])
    registry = JobRegistry([job_type])
    for name in ("mail.send", "mail.sent", "mail"):
        assert registry.get_type(name) is job_type
        assert registry.policy(name) == job_type.policy
        assert registry.admit(name, {"to": []}).job_type is job_type
        assert registry.read(name, '{"to": []}') == MailSend(to=[])
    assert list(registry) == ["mail.send"]
    assert dict(registry.renamed) == {"mail.sent": "mail.send", "mail": "mail.send"}


@pytest.mark.parametrize(
    ("former", "message"),
    [
        (["Mail"], 'former_names\\[0\\] is "Mail": a name is lower-case words'),
        ([3], "former_names\\[0\\] is 3"),
        ("mail", "expected a list of names"),
        (["mail.send"], "former_names has mail.send, the name of the type now"),
        (["mail", "mail"], "former_names has mail twice"),
        (["other"], "its former name other is the name of another job type"),
        (["theirs"], "job types .* both have the former name theirs"),
    ],
)
def test_a_wrong_former_name_stops_the_start(former: Any, message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        JobRegistry(
            [
                JobType(name="other", payload=MailSend, former_names=["theirs"]),
                JobType(name="mail.send", payload=MailSend, former_names=former),
            ]
        )


def test_a_policy_parks_what_it_cannot_read_unless_it_says_otherwise() -> None:
    assert JobPolicy().on_mismatch == "park"
    assert JobPolicy(on_mismatch="fail").on_mismatch == "fail"
    wrong: Any = "keep"
    with pytest.raises(DefinitionError, match='on_mismatch is "keep", expected park or fail'):
        JobPolicy(on_mismatch=wrong)


class Version(Payload):
    """The base of models that differ in one field: version 3 has `v3`."""


VERSIONS: list[Any] = [
    type(f"Version{n}", (Version,), {"__annotations__": {f"v{n}": list[int]}}) for n in range(6)
]


@given(st.permutations(range(5)), st.lists(st.integers(0, 9), max_size=5), st.data())
def test_a_chain_of_upgrades_applies_each_step_once_and_in_order(
    order: list[int], values: list[int], data: st.DataObject
) -> None:
    """Whatever order the upgrades are registered in, and wherever each of them leads."""
    leads_to = {n: data.draw(st.integers(n + 1, 5), label=f"from {n}") for n in range(5)}
    job_type = JobType(name="a", payload=VERSIONS[5])

    def step(source: int, target: int) -> Callable[[Any], Any]:
        def function(older: Any) -> Any:
            return VERSIONS[target](**{f"v{target}": [*getattr(older, f"v{source}"), target]})

        function.__annotations__["return"] = VERSIONS[target]
        return function

    for source in order:
        job_type.upgrade(VERSIONS[source])(step(source, leads_to[source]))
    registry = JobRegistry([job_type])
    for source in range(6):
        passed, at = [], source
        while at != 5:
            at = leads_to[at]
            passed.append(at)
        read: Any = registry.read("a", json.dumps({f"v{source}": values}))
        assert read.v5 == [*values, *passed]


@pytest.mark.parametrize(
    ("before", "after", "running", "reason", "is_notable"),
    [
        ({"concurrency_limit": 5}, {"concurrency_limit": 6}, 9, "More jobs may run", False),
        ({"concurrency_limit": 5}, {"concurrency_limit": None}, 9, "More jobs may run", False),
        ({}, {"concurrency_limit": 5}, 5, "Fewer jobs may run at once. It takes", True),
        ({}, {"concurrency_limit": 5}, 6, "Fewer jobs may run at once, and 6 run now", True),
        ({"concurrency_limit": 5}, {"concurrency_limit": 4}, 4, "Fewer jobs may run at once. It",
         True),
        ({"timeout_seconds": 5}, {"timeout_seconds": 6}, 0, "Attempts may take more time", False),
        ({"timeout_seconds": 5}, {"timeout_seconds": 4}, 0, "Attempts may take less time", True),
        ({"max_attempts": 5}, {"max_attempts": 6}, 0, "Jobs have more attempts", False),
        ({"max_attempts": 5}, {"max_attempts": 4}, 0, "Jobs have fewer attempts", True),
        ({}, {"backoff": Backoff(5.0)}, 0, "The wait between attempts has changed", False),
        ({}, {"on_mismatch": "fail"}, 0, "A job whose stored payload cannot be read fails", True),
        ({"on_mismatch": "fail"}, {}, 0, "A job whose stored payload cannot be read stays queued",
         False),
    ],
)  # fmt: skip
def test_a_change_of_a_policy_says_what_it_means_and_whether_to_take_note(
    before: dict[str, Any],
    after: dict[str, Any],
    running: int,
    reason: str,
    is_notable: bool,
) -> None:
    released, current = (
        released_types([JobType(name="a", payload=Empty, policy=JobPolicy(**options))])
        for options in (before, after)
    )
    (change,) = changes_between(released, current, {"a": running})
    assert change.reason.startswith(reason)
    assert change.is_notable is is_notable
    assert changes_between(released, released, {"a": running}) == []


class Empty(Payload):
    """Nothing."""
