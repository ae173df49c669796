"""What can be stored as JSON: bounds of numbers, text, depth and size, and where a fault is."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from job_registry.json_values import (
    NotJson,
    count_values,
    json_document,
    parse_json,
    pointer,
    pointer_of,
)

NUL = "a\0"
EXPECTED = "Expected Unicode text without NUL; got"


def faults_of(value: object, max_bytes: int = 100_000) -> list[tuple[str, str]]:
    return [(each.path, each.code) for each in json_document(value, max_bytes=max_bytes)[1]]


@pytest.mark.parametrize(
    ("token", "found"),
    [
        ("a", "/a"),
        ("a~b", "/a~0b"),
        ("a/b", "/a~1b"),
        ("~/", "/~0~1"),
        ("~1", "/~01"),
        ("", "/"),
        (0, "/0"),
    ],
)
def test_a_name_is_escaped_in_a_pointer(token: str | int, found: str) -> None:
    assert pointer("", token) == pointer_of([token]) == found
    assert pointer("/x", token) == pointer_of(["x", token]) == f"/x{found}"


def test_a_pointer_ends_at_the_last_parent_that_fits() -> None:
    assert pointer_of(["a" * 1_999]) == "/" + "a" * 1_999
    assert pointer_of(["a", "b" * 1_998, "c"]) == "/a"
    assert pointer_of(["a", "b" * 5_000, "c"]) == "/a"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (NUL, f"{EXPECTED} NUL at character 1."),
        ("ab\ud800", f"{EXPECTED} the lone surrogate U+D800 at character 2."),
        ({NUL: 1}, f"The name of a field: {EXPECTED} NUL at character 1."),
        ({1: 1}, "Expected text as the name of a field; got 1."),
        (2**63, f"Expected an integer of 64 bits; got {2**63}."),
        (float("inf"), "Expected a finite number; got Infinity."),
        ({1}, "Expected a JSON value (object, array, string, number, boolean or null); got a set,"
              " which JSON does not have."),
    ],
)  # fmt: skip
def test_a_fault_says_what_was_expected(value: object, message: str) -> None:
    ((_, (fault,)),) = [json_document(value, max_bytes=1_000)]
    assert fault.message == message


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 0, True, False, None, 1.5, "é", "\\u0000"])
def test_a_value_within_the_bounds_is_stored_as_it_is(value: object) -> None:
    for each in (value, [value], {"a": value}, [[value], {"b": [value]}]):
        text, faults = json_document(each, max_bytes=1_000)
        assert (json.loads(text), faults) == (each, [])
        # Beside a fault as well
        text, faults = json_document([NUL, each], max_bytes=1_000)
        assert (json.loads(text), len(faults)) == (["x", each], 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1", "the text ends too early at line 1, column 2"),
        ("[1,]", "unexpected comma at line 1, column 4"),
        ("[1\n 2]", "unexpected character at line 2, column 2"),
        ("NaN", "unexpected character at line 1, column 1"),
        ("[Infinity]", "unexpected character at line 1, column 2"),
        ("1 2", "more text after the end of the value at line 1, column 3"),
    ],
)
def test_text_that_is_not_json_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(NotJson) as refused:
        parse_json(text, "The body")
    assert str(refused.value) == f"The body is not valid JSON: {words}"
    assert parse_json('{"a": [1, 2.5]}') == {"a": [1, 2.5]}


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_an_integer_of_more_than_64_bits_is_refused_wherever_it_is(value: int) -> None:
    code = "integer_too_large"
    assert faults_of(value) == [("", code)]
    assert faults_of({"a": [1, value], "b": value}) == [("/a/1", code), ("/b", code)]


@pytest.mark.parametrize("leaf", [1, NUL])
@pytest.mark.parametrize("kind", ["array", "object", "both"])
@pytest.mark.parametrize("levels", [64, 65])
def test_64_levels_of_nesting_are_stored(kind: str, levels: int, leaf: Any) -> None:
    value = leaf
    for level in range(levels):
        is_array = kind == "array" or (kind == "both" and level % 2)
        value = [value] if is_array else {"a": value}
    codes = [code for _, code in faults_of(value)]
    if levels == 65:
        assert codes == ["too_deep"]
    else:
        assert codes == (["invalid_text"] if leaf == NUL else [])


@pytest.mark.parametrize("value", [{"a": [1, 2]}, "é", [None]])
def test_a_document_of_the_largest_size_is_stored(value: object) -> None:
    size = len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
    assert faults_of(value, size) == []
    (fault,) = json_document(value, max_bytes=size - 1)[1]
    assert fault.message == f"Expected at most {size - 1} bytes of JSON; got {size}."


def test_a_document_with_faults_is_measured_too() -> None:
    text, (fault,) = json_document([NUL, "b"], max_bytes=9)
    assert (json.loads(text), fault.path) == (["x", "b"], "/0")
    assert faults_of([NUL, "b"], 8) == [("", "too_large")]
    (fault,) = json_document([NUL, *range(1_000)], max_bytes=100)[1]
    assert fault.message == "Expected at most 100 bytes of JSON; got more."


def test_the_first_100_faults_are_named_in_their_order() -> None:
    value = {"a": [NUL, 1, NUL], "b": {"c": NUL, "d": {NUL: 1}}, "e": NUL}
    code = "invalid_text"
    assert faults_of(value) == [
        (path, code) for path in ("/a/0", "/a/2", "/b/c", "/b/d", "/e")
    ]  # fmt: skip
    assert faults_of([NUL] * 150) == [(f"/{n}", code) for n in range(100)]


def values_in(value: object) -> int:
    """Count the values of a document; an empty array or object counts as two."""
    if isinstance(value, dict | list):
        below = value.values() if isinstance(value, dict) else value
        return 1 + sum(map(values_in, below)) if value else 2
    return 1


def random_value(random: Random, depth: int = 0) -> Any:
    kind = random.choice("sssnlo" if depth < 4 else "sn")
    text = random.choice(["", "a", "a,b", "[", '{"', "\\", '\\"', "[,{" * 4])
    if kind == "l":
        return [random_value(random, depth + 1) for _ in range(random.randint(0, 5))]
    if kind == "o":
        return {f"{text}{n}": random_value(random, depth + 1) for n in range(random.randint(0, 5))}
    return text if kind == "s" else random.choice([0, 1.5, True, None])


def test_values_are_counted_without_parsing() -> None:
    random = Random(1)
    for _ in range(300):
        value = random_value(random)
        text, exact = json.dumps(value).encode(), values_in(value)
        # A bound above may count the punctuation of texts; one that is more than enough is sound.
        assert count_values(text, enough=10**6) >= exact
        for enough in (0, 3, 10):
            counted = count_values(text, enough)
            assert (counted > enough) == (exact > enough), (text, enough)
    assert count_values(json.dumps(["[,{"] * 40).encode(), 30) in range(31, 42)
