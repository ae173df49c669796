"""Admitting payloads: strict, every fault at once, never a crash."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import field_validator

from job_registry import JobRegistry, JobType, JobTypeNotFound, Payload, PayloadInvalid
from job_registry.catalog.payout import payout_execute
from job_registry.catalog.thumbnail import ThumbnailCreate, thumbnail_create
from job_registry.json_values import (
    MAX_VIOLATIONS,
    NotJson,
    count_values,
    json_document,
    parse_json,
)
from tests.registry.test_job_types import Everything

EVERYTHING = JobType(name="test.everything", payload=Everything)
REGISTRY = JobRegistry([thumbnail_create, payout_execute, EVERYTHING])
GOOD: dict[Any, Any] = {"assetId": "id", "versionNumber": 1}


def faults(job_type: str, payload: object) -> list[tuple[str, str]]:
    with pytest.raises(PayloadInvalid) as refused:
        REGISTRY.validate(job_type, payload)
    assert all(v.message and len(v.message) < 500 for v in refused.value.violations)
    return [(violation.path, violation.code) for violation in refused.value.violations]


def test_a_good_payload_is_parsed_and_its_json_is_what_came_in() -> None:
    admitted = REGISTRY.admit("thumbnail.create", GOOD)
    assert admitted.payload == ThumbnailCreate(asset_id="id", version_number=1)
    assert admitted.json == b'{"assetId":"id","versionNumber":1}'
    with pytest.raises(JobTypeNotFound):
        REGISTRY.admit("nope", GOOD)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({}, [("/assetId", "required"), ("/versionNumber", "required")]),
        ({**GOOD, "versionNumber": "1"}, [("/versionNumber", "wrong_type")]),
        ({**GOOD, "versionNumber": True}, [("/versionNumber", "wrong_type")]),
        ({**GOOD, "versionNumber": 1.5}, [("/versionNumber", "wrong_type")]),
        ({**GOOD, "versionNumber": None}, [("/versionNumber", "wrong_type")]),
        ({**GOOD, "versionNumber": 0}, [("/versionNumber", "out_of_range")]),
        ({**GOOD, "assetId": 1}, [("/assetId", "wrong_type")]),
        ({**GOOD, "assetId": ""}, [("/assetId", "too_short")]),
        ({**GOOD, "assetId": "x" * 201}, [("/assetId", "too_long")]),
        ({**GOOD, "sizes": []}, [("/sizes", "too_short")]),
        ({**GOOD, "sizes": 128}, [("/sizes", "wrong_type")]),
        ({**GOOD, "sizes": [128, "x", 0]}, [("/sizes/1", "wrong_type"), ("/sizes/2", "out_of_range")]),
        ({**GOOD, "a/b~c": 1}, [("/a~1b~0c", "unknown_field")]),
        ({"asset_id": "id", "versionNumber": 1}, [("/assetId", "required"), ("/asset_id", "unknown_field")]),
        ({**GOOD, "assetId": "a\0"}, [("/assetId", "invalid_text")]),
        ({**GOOD, "assetId": "\ud800"}, [("/assetId", "invalid_text")]),
        ({**GOOD, "versionNumber": 2**63}, [("/versionNumber", "integer_too_large")]),
        ({**GOOD, "versionNumber": -(10**400)}, [("/versionNumber", "integer_too_large")]),
        ({**GOOD, "sizes": [float("nan"), float("inf")]}, [("/sizes/0", "not_finite"), ("/sizes/1", "not_finite")]),
        ({**GOOD, "sizes": (1,)}, [("/sizes", "not_json")]),
        ({**GOOD, "sizes": {1}}, [("/sizes", "not_json")]),
        ({**GOOD, "sizes": object()}, [("/sizes", "not_json")]),
        ({**GOOD, 1: 2}, [("", "not_json")]),
        ({**GOOD, "\ud800": 2}, [("", "invalid_text")]),
        ([], [("", "wrong_type")]),
        ("text", [("", "wrong_type")]),
        (None, [("", "wrong_type")]),
        (7, [("", "wrong_type")]),
        (b"{}", [("", "not_json"), ("", "wrong_type")]),
    ],
)  # fmt: skip
def test_every_fault_is_reported_where_it_is(
    payload: object, expected: list[tuple[str, str]]
) -> None:
    found = faults("thumbnail.create", payload)
    assert found == expected or (payload == b"{}" and ("", "not_json") in found)


def test_faults_of_json_and_of_the_schema_are_reported_together() -> None:
    assert faults("thumbnail.create", {"sizes": [float("nan"), "x"], "extra": "\0"}) == [
        ("/assetId", "required"),
        ("/extra", "invalid_text"),
        ("/sizes/0", "not_finite"),
        ("/sizes/1", "wrong_type"),
        ("/versionNumber", "required"),
    ]


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(PayloadInvalid) as refused:
        REGISTRY.validate("thumbnail.create", {"asset_id": "id", "versionNumbr": 1})
    messages = {v.path: v.message for v in refused.value.violations}
    assert "Did you mean assetId?" in messages["/asset_id"]
    assert "Did you mean versionNumber?" in messages["/versionNumbr"]


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


def test_what_is_too_deep_too_large_or_without_end_is_a_clear_error() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert faults("thumbnail.create", {**GOOD, "sizes": deep(5_000)})[0][1] == "too_deep"
    assert faults("thumbnail.create", {**GOOD, "sizes": endless})[0][1] == "too_deep"
    assert faults("thumbnail.create", {**GOOD, "assetId": "x" * 10_000_000}) == [("", "too_large")]
    assert faults("thumbnail.create", {**GOOD, "sizes": [1] * 5_000_000}) == [("", "too_large")]


def test_the_size_limit_is_exact() -> None:
    small = JobRegistry([payout_execute], max_payload_bytes=60)
    base = {"batchId": "b", "escrowId": ""}
    room = 60 - len(json.dumps(base, separators=(",", ":")))
    small.admit("payout.execute", {**base, "escrowId": "x" * room})
    with pytest.raises(PayloadInvalid):
        small.admit("payout.execute", {**base, "escrowId": "x" * (room + 1)})


def test_a_fault_in_a_payload_of_half_the_size_limit_is_found() -> None:
    long = JobRegistry([payout_execute], max_payload_bytes=100)
    with pytest.raises(PayloadInvalid) as refused:
        long.admit("payout.execute", {"batchId": "b" * 60 + "\0", "escrowId": "e"})
    assert [v.path for v in refused.value.violations] == ["/batchId"]


def test_all_violations_are_listed_if_they_are_as_many_as_the_bound() -> None:
    with pytest.raises(PayloadInvalid) as refused:
        REGISTRY.validate("thumbnail.create", {**GOOD, **dict.fromkeys(
            (f"field{n}" for n in range(MAX_VIOLATIONS)), 1)})  # fmt: skip
    assert {v.code for v in refused.value.violations} == {"unknown_field"}
    assert len(refused.value.violations) == MAX_VIOLATIONS


def test_the_key_at_fault_is_named() -> None:
    class Labelled(Payload):
        counts: dict[Literal["red", "blue"], int]

    registry = JobRegistry([JobType(name="test.labelled", payload=Labelled)])
    with pytest.raises(PayloadInvalid) as refused:
        registry.admit("test.labelled", {"counts": {"green": 1}})
    (violation,) = refused.value.violations
    assert violation.path == "/counts/green"
    assert violation.message.endswith('got "green".')


def test_the_number_of_violations_is_bounded() -> None:
    with pytest.raises(PayloadInvalid) as refused:
        REGISTRY.validate("thumbnail.create", {**GOOD, "sizes": ["x"] * 16, **dict.fromkeys(
            (f"field{n}" for n in range(1_000)), 1)})  # fmt: skip
    assert len(refused.value.violations) == MAX_VIOLATIONS + 1
    assert refused.value.violations[-1].code == "more"


@pytest.mark.parametrize("path", ["amount", "part/price", "parts/0/price"])
def test_decimals_come_as_strings(path: str) -> None:
    payload: Any = json.loads(json.dumps(dict(EVERYTHING.example_payload)))
    parent: Any = payload
    *way, last = path.split("/")
    for step in way:
        parent = parent[int(step) if step.isdigit() else step]
    for value, code in ((1.5, "wrong_type"), (1, "wrong_type"), ("one", "invalid_format"),
                        ("NaN", None), ("Infinity", None)):  # fmt: skip
        parent[last] = value
        found = faults("test.everything", payload)
        assert [where for where, _ in found] == [f"/{path}"]
        assert code in (None, found[0][1])
    parent[last] = "12.50"
    parsed: Any = REGISTRY.validate("test.everything", payload)
    assert parsed.amount == Decimal("12.50") or path != "amount"


def test_a_users_own_validator_makes_violations_and_its_bugs_are_not_hidden() -> None:
    class Own(Payload):
        even: int

        @field_validator("even")
        @classmethod
        def _check(cls, value: int) -> int:
            if value == 13:
                raise KeyError("a bug")
            if value == 14:
                raise AssertionError  # As `assert` does without a message.
            if value == 15:
                raise ValueError
            if value % 2:
                raise ValueError("has to be even")
            return value

    registry = JobRegistry([JobType(name="own", payload=Own, example={"even": 2})])
    with pytest.raises(PayloadInvalid) as refused:
        registry.validate("own", {"even": 3})
    (violation,) = refused.value.violations
    assert (violation.path, violation.code) == ("/even", "refused")
    assert "has to be even" in violation.message
    with pytest.raises(KeyError):
        registry.validate("own", {"even": 13})
    for value in (14, 15):
        with pytest.raises(PayloadInvalid) as refused:
            registry.validate("own", {"even": value})
        (violation,) = refused.value.violations
        assert violation.message == f"The value is not allowed; got {value}."


JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=5)
        | st.tuples(inner)
    ),
    max_leaves=20,
)
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "assetId": st.text(max_size=5) | st.from_regex(r"[A-Za-z0-9._-]{1,5}", fullmatch=True) | JUNK,
        "versionNumber": st.integers(-2, 2**31) | JUNK,
        "sizes": st.lists(st.integers(-1, 9_000) | JUNK, max_size=18) | JUNK,
        "other": JUNK,
    },
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(payload=JUNK | NEARLY)
def test_junk_is_refused_with_violations_or_admitted_and_never_crashes(payload: Any) -> None:
    try:
        admitted = REGISTRY.admit("thumbnail.create", payload)
    except PayloadInvalid as refused:
        assert 1 <= len(refused.violations) <= MAX_VIOLATIONS + 1  # noqa: PT017
        return
    # What is admitted reads back as what came in, and parses to the same again.
    again = parse_json(admitted.json)
    assert again == payload
    assert REGISTRY.admit("thumbnail.create", again) == admitted


@pytest.mark.parametrize("name", ["[", "a[b]", "int", "x()", ""])
def test_an_unknown_field_is_named_whatever_its_name_looks_like(name: str) -> None:
    with pytest.raises(PayloadInvalid) as refused:
        REGISTRY.admit("payout.execute", {"batchId": "b", "escrowId": "e", name: None})
    (violation,) = refused.value.violations
    assert (violation.path, violation.code) == (f"/{name}", "unknown_field")


JSON_LIKE = st.fixed_dictionaries(
    {},
    optional={
        "assetId": st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=4) | st.integers(),
        "versionNumber": st.integers(-5, 5) | st.just("1") | st.booleans() | st.none() | st.just(0.5),
        "sizes": st.lists(st.integers(-2, 9_000) | st.just("x"), max_size=18) | st.none(),
        "extra": st.booleans(),
    },
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(payload=JSON_LIKE)
def test_the_json_schema_says_the_same_as_the_registry(payload: dict[str, Any]) -> None:
    validator = Draft202012Validator(dict(thumbnail_create.payload_schema))
    try:
        REGISTRY.admit("thumbnail.create", payload)
    except PayloadInvalid:
        assert not validator.is_valid(payload)
    else:
        assert validator.is_valid(payload)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "the text ends too early at line 1, column 0"),
        ("{", "the text ends too early at line 1, column 1"),
        ("nope", "unexpected character at line 1, column 2"),
        ('{"a" 1}', "unexpected character at line 1, column 6"),
        ("[NaN]", "unexpected character at line 1, column 2"),
        ("[Infinity]", "unexpected character at line 1, column 2"),
        (b"\xff", "unexpected character at line 1, column 1"),
        (b'"\xff"', "text that is not UTF-8 at line 1, column 2"),
        ("[" * 100_000, "too many nested arrays and objects at line 1, column 202"),
        ("{}\n{}", "more text after the end of the value at line 2, column 1"),
        ("[1,]", "unexpected comma at line 1, column 4"),
        ("{a: 1}", "expected a name in double quotes at line 1, column 2"),
        ('"\n"', "unescaped control character in a string at line 2, column 0"),
        (r'"\q"', "invalid escape in a string at line 1, column 3"),
        (r'"\ud800"', "invalid escape in a string at line 1, column 8"),
        ("[01]", "invalid number at line 1, column 3"),
    ],
)
def test_text_that_is_not_json_is_refused_with_the_place(text: str | bytes, fault: str) -> None:
    with pytest.raises(NotJson) as refused:
        parse_json(text, "The body")
    assert str(refused.value) == f"The body is not valid JSON: {fault}"


def test_the_text_of_a_document_is_compact_utf8() -> None:
    assert json_document({"ä": [1, 2.5, None]}, max_bytes=99) == ('{"ä":[1,2.5,null]}'.encode(), [])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (b"1", 1),
        (b'{"a": [1, 2], "b": "x"}', 5),
        (b'["a,b", "[{", "\\"," , "\\\\", ","]', 6),
        (b"[[], {}]", 5),
        (b'["\xc3\xa4,,,,,,,,,,,,,,,,,", 2]', 3),
    ],
)
def test_values_are_counted_without_parsing(text: bytes, values: int) -> None:
    assert count_values(text, values - 1) == values
    assert count_values(text, 100) >= values


def test_values_in_a_text_of_strings_alone_are_not_counted_one_by_one() -> None:
    assert count_values(b'["",' * 1_000 + b'""]', 10) > 10
