"""Hypothesis strategies for hostile requests over HTTP and WebSockets.

Hypothesis draws a shape: a small text, and how often it is repeated. A request of eight megabytes
takes no more choices than one of eight bytes, and its shape describes it in one line.
The operations come from the GraphQL schema, so new ones are included. `hostile_requests` sends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote

import hypothesis
from graphql import (
    GraphQLEnumType,
    GraphQLField,
    GraphQLInputObjectType,
    GraphQLInputType,
    GraphQLInterfaceType,
    GraphQLNamedType,
    GraphQLObjectType,
    GraphQLScalarType,
    GraphQLUnionType,
    build_schema,
    get_named_type,
    is_required_argument,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import job_registry_api

BODY_LIMIT: Final = 8_388_608
"""The default of JOBS_MAX_BODY_BYTES."""

MAX_URL: Final = 60_000
MAX_UNADMITTED: Final = 16_384

JOB_ID: Final = "00000000-0000-4000-8000-00000000000a"
"""Stands for the id of a stored job."""
LEASE_TOKEN: Final = "the-lease-token-of-a-running-job"
"""Stands for a lease in force."""

_SCHEMA: Final = build_schema(
    (Path(job_registry_api.__file__).parent / "graphql" / "schema.graphql").read_text()
)


@dataclass(frozen=True)
class HttpRequest:
    """A request over HTTP."""

    kind: str
    shape: str
    """What it was built from."""
    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = field(default=b"", repr=False)

    @property
    def needs_a_job(self) -> bool:
        """Whether it has what stands for a job or its lease."""
        texts = (self.path.encode(), self.body)
        return any(name.encode() in text for text in texts for name in (JOB_ID, LEASE_TOKEN))

    @property
    def size(self) -> int:
        """Return how many bytes it has, beside the small headers."""
        return len(self.path) + len(self.body) + sum(len(v) for _, v in self.headers)


@dataclass(frozen=True)
class SocketMessages:
    """Messages over one WebSocket."""

    kind: str
    shape: str
    messages: tuple[str | bytes, ...] = field(repr=False)
    is_initialised: bool
    """Whether `connection_init` goes first."""
    operations: int = 0
    """How many operations have to end."""

    @property
    def needs_a_job(self) -> bool:
        """Whether they have what stands for a job or its lease."""
        texts = [text for text in self.messages if isinstance(text, str)]
        return any(name in text for text in texts for name in (JOB_ID, LEASE_TOKEN))

    @property
    def size(self) -> int:
        """Return how many bytes the messages have."""
        return sum(len(m if isinstance(m, bytes) else m.encode()) for m in self.messages)


Request = HttpRequest | SocketMessages


@dataclass(frozen=True)
class Repeated:
    """`before`, `unit` so many times, `middle`, `tail` as many times, `after`.

    Each `§` in the unit becomes the number of the repetition, and each `¶` the number after it.
    """

    unit: Shape
    times: int
    before: str = ""
    separator: str = ""
    middle: Shape = ""
    tail: str = ""
    after: Shape = ""

    def __str__(self) -> str:
        parts = [_described(self.before), f"{_described(self.unit)} × {self.times:,}"]
        parts += [_described(part) for part in (self.middle, self.tail, self.after)]
        return f"({' '.join(part for part in parts if part)})"

    @cached_property
    def text(self) -> str:
        """The text itself."""
        unit = _text(self.unit)
        if "§" in unit:
            units = self.separator.join(
                unit.replace("§", str(n)).replace("¶", str(n + 1)) for n in range(self.times)
            )
        else:
            units = (unit + self.separator) * (self.times - 1) + unit
        tails = self.tail * self.times
        return f"{self.before}{units}{_text(self.middle)}{tails}{_text(self.after)}"


Shape: TypeAlias = str | Repeated


def _text(shape: Shape) -> str:
    return shape if isinstance(shape, str) else shape.text


def _described(shape: Shape) -> str:
    return ascii(shape) if shape and isinstance(shape, str) else str(shape)


# Values, as JSON

_TIMES: Final = st.one_of(
    # Around the limits: of aliases, faults, jobs, typed values and JSON values.
    st.sampled_from((1, 3, 30, 101, 1_000, 19_999, 66_000, 99_000, 190_000, 1_000_000, BODY_LIMIT)),
    st.integers(1, 200_000),
)
_NAMES: Final = st.sampled_from(("assetId", "versionNumber", "sizes", "payload", "type", "a", ""))
_LETTERS: Final = st.sampled_from(
    ("x", "/", "~", "\\n", "\\u0000", "\\ud800", "\\ud83d\\ude00", "\\u202e", "é", "\u200b", "😀")
)
_DIGITS: Final = st.sampled_from(("", "-", "0.", "1e", "1e-", "1."))
_WORDS: Final = (
    "0",
    "-1",
    "1",
    "128",
    "null",
    "true",
    '""',
    '"a"',
    "{}",
    "[]",
    '{"a":0}',
    "NaN",
    "1e308",
    "1e999",
    "-0.0",
    "2147483648",
    "9223372036854775808",
    '"2030-01-01T00:00:00Z"',
    '"QUEUED"',
    '"thumbnail.create"',
    '"\\u0000"',
    '"\\ud800"',
    f'"{JOB_ID}"',
)
_SCALARS: Final = st.one_of(
    st.sampled_from(_WORDS),
    st.integers().map(str),
    st.text(max_size=5).map(json.dumps),
)


@st.composite
def _values(draw: st.DrawFn, size: int = BODY_LIMIT) -> Shape:
    """Draw a JSON value of up to this size, or what looks like the beginning of one."""
    shape: Shape = draw(_SCALARS)
    room = size
    if draw(st.booleans()):
        unit = draw(_LETTERS)
        times = _fitting(draw(_TIMES), len(unit.encode()), room)
        shape = Repeated(unit, times, before='"', after='"')
        if draw(st.integers(0, 3)) == 0:
            shape = Repeated("9", times, before=draw(_DIGITS))
    for _ in range(draw(st.integers(0, 3))):
        length = len(_text(shape).encode()) + 12
        times = _fitting(draw(_TIMES), length, room)
        name = draw(_NAMES)
        kind = draw(
            st.sampled_from(("list", "object", "numbered", "deep", "open", "field", "long"))
        )
        if kind == "list":
            shape = Repeated(shape, times, before="[", separator=",", after="]")
        elif kind in ("object", "numbered"):
            number = "§" if kind == "numbered" else ""
            entry = Repeated("", 1, before=f'"{name}{number}":', after=shape)
            shape = Repeated(entry, times, before="{", separator=",", after="}")
        elif kind == "deep":
            opening, closing = draw(st.sampled_from((("[", "]"), (f'{{"{name}":', "}"))))
            times = _fitting(times, len(opening) + 1, room - length)
            shape = Repeated(opening, times, middle=shape, tail=closing)
        elif kind == "open":
            shape = Repeated(draw(st.sampled_from(("[", '{"a":', '{"a":[', "[0,"))), times)
        elif kind == "long":
            times = _fitting(times, 1, room - length)
            shape = Repeated("y", times, before='{"', middle=Repeated(shape, 1, '":', after="}"))
        else:
            shape = Repeated("", 1, before=f'{{"{name}":', middle=shape, after="}")
    return shape


def _fitting(times: int, length: int, size: int) -> int:
    return max(1, min(times, size // max(1, length)))


def _object(fields: dict[str, str]) -> str:
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


@st.composite
def _with_hostile_field(
    draw: st.DrawFn, valid: dict[str, str], names: list[str], value: str
) -> tuple[str, str]:
    """Return an object with this value in one field, and the name of the field."""
    name = draw(st.sampled_from([*names, "unknown"]))
    return name, _object({**valid, name: value})


# HTTP

_PAYLOAD: Final = {"assetId": '"a"', "versionNumber": "1"}
_JOB: Final = {"type": '"thumbnail.create"', "payload": _object(_PAYLOAD)}
_JSON: Final = ((b"content-type", b"application/json"),)
_CODINGS: Final = st.sampled_from((b"", b"", b"", b"", b"\xff", b"\0", b"]", b"\xed\xa0\x80"))


def _body(text: str, tail: bytes = b"") -> bytes:
    return (text.encode(errors="surrogatepass")[: BODY_LIMIT - len(tail)]) + tail


@st.composite
def _rest(draw: st.DrawFn) -> HttpRequest:
    value = draw(_values(BODY_LIMIT - 200))
    place = draw(st.sampled_from(("body", "job", "payload")))
    text = _text(value)
    if place == "job":
        name, text = draw(_with_hostile_field(_JOB, _fields_of("EnqueueJobInput"), text))
        place = f"job.{name}"
    elif place == "payload":
        name, text = draw(_with_hostile_field(_PAYLOAD, ["sizes", *_PAYLOAD], text))
        place, text = f"payload.{name}", _object({**_JOB, "payload": text})
    tail = draw(_CODINGS)
    shape = f"{place} {value} {tail!r}"
    return HttpRequest("rest", shape, "POST", "/jobs", _JSON, _body(text, tail))


_FILTERS: Final = (
    "type", "status", "createdBy", "createdAfter", "finishedBefore", "idempotencyKey", "errorCode",
    "search", "first", "after", "unknown",
)  # fmt: skip
_CHANGES: Final = (
    "/jobs/bulk", f"/jobs/{JOB_ID}/cancel", f"/jobs/{JOB_ID}/retry", f"/jobs/{JOB_ID}/unknown",
)  # fmt: skip


@st.composite
def _rest_routes(draw: st.DrawFn) -> HttpRequest:
    """Draw a list of jobs by a hostile filter, or a change with a hostile body."""
    if draw(st.booleans()):
        value = draw(_values(MAX_URL // 3))
        names = draw(st.lists(st.sampled_from(_FILTERS), min_size=1, max_size=3))
        text = quote(_text(value).strip('"').encode(errors="replace"))
        query = "&".join(f"{name}={text}" for name in names)
        shape = f"{'&'.join(names)} {value}"
        return HttpRequest("rest, routes", shape, "GET", f"/jobs?{query}"[:MAX_URL])
    path = draw(st.sampled_from(_CHANGES))
    value = draw(_values(BODY_LIMIT - 200))
    text, times = _text(value), 1
    if path == "/jobs/bulk" and draw(st.booleans()):
        _, text = draw(_with_hostile_field(_JOB, _fields_of("EnqueueJobInput"), text))
        times = _fitting(draw(_TIMES), len(text.encode(errors="replace")) + 1, BODY_LIMIT - 200)
        text = f'{{"jobs":[{",".join([text] * times)}]}}'
    return HttpRequest(
        "rest, routes", f"{path} {times} × {value}", "POST", path, _JSON, _body(text)
    )


_UPLOADS: Final = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8\xff",
    "image/gif": b"GIF89a",
    "image/webp": b"RIFF",
    "image/svg+xml": b"<svg>",
}


@st.composite
def _uploads(draw: st.DrawFn) -> HttpRequest:
    """Draw a file for the assets: an odd name, a type, and up to 40 MB."""
    unit = draw(st.sampled_from(("a", ".", "..%2f", "%00", "%ff", "%f0%9f%98%80", "a/")))
    name = Repeated(unit, _fitting(draw(_TIMES), len(unit), draw(st.sampled_from((3, 20_000)))))
    version = draw(st.sampled_from(("1", "0", "-1", "9" * 5_000, "1e9", "%d9%a1", "", "1/2")))
    media_type, start = draw(st.sampled_from(sorted(_UPLOADS.items())))
    times = draw(st.sampled_from((0, 1, 100, 1_000_000, 40_000_000)))
    body = draw(st.sampled_from((start, b""))) + draw(st.sampled_from((b"\0", b"9"))) * times
    headers = ((b"content-type", media_type.encode()),)
    shape = f"{name}/{version[:10]} {media_type} {body[:8]!r} × {times:,}"
    return HttpRequest(
        "uploads", shape, "POST", f"/assets/{name.text}/{version}"[:MAX_URL], headers, body
    )


_HEADERS: Final = ("accept", "authorization", "content-type", "cookie", "origin", "traceparent")


@st.composite
def _http(draw: st.DrawFn) -> HttpRequest:
    """Draw a request whose line or headers are odd, and have less than the limit of 64 KB."""
    method = draw(st.sampled_from(("GET", "POST", "HEAD", "OPTIONS", "PUT", "BREW")))
    path = draw(st.sampled_from(("/jobs", "/graphql", "/jobs/", "/readyz", "/", f"/jobs/{JOB_ID}")))
    unit = draw(st.sampled_from(("a", "%00", "%ff", "..%2f", "a=1&", "%f0%9f%98%80")))
    tail = Repeated(unit, _fitting(draw(_TIMES), len(unit), draw(st.sampled_from((10, 20_000)))))
    separator = draw(st.sampled_from(("", "?")))
    name = draw(st.sampled_from(_HEADERS))
    piece = draw(
        st.sampled_from(("a", "application/json;q=0.1,", "*/*;q=x,", "Bearer ", "é", ".,"))
    )
    times = _fitting(draw(_TIMES), len(piece), draw(st.sampled_from((10, 3_000, 20_000))))
    header = Repeated(piece, times)
    headers = [(name.encode(), header.text.encode().strip())]
    headers += [(f"x-{n}".encode(), b"a") for n in range(draw(st.sampled_from((0, 0, 50, 1_000))))]
    shape = f"{separator}{tail} {name}: {header}, {len(headers)} headers"
    return HttpRequest("http", shape, method, path + separator + tail.text, tuple(headers), b"{}")


# GraphQL

_VALID: Final[dict[str, str]] = {
    "Boolean": "false",
    "DateTime": '"2030-01-01T00:00:00Z"',
    "ID": f'"{JOB_ID}"',
    "Int": "1",
    "JSON": "0",
    "JobStatus": '"QUEUED"',
    "String": '"thumbnail.create"',
}
_VALID_FIELDS: Final[dict[str, dict[str, str]]] = {
    "EnqueueJobInput": _JOB,
    "JobErrorInput": {"message": '"a"'},
    "JobLogLineInput": {"message": '"m"', "seconds": "0.5"},
    "LeaseJobsInput": {"jobTypes": '["thumbnail.create"]', "workerId": '"w"'},
    "TypedJobInput": {"thumbnailCreate": _object(_PAYLOAD)},
}


def _fields_of(name: str) -> list[str]:
    kind = _SCHEMA.type_map[name]
    assert isinstance(kind, GraphQLInputObjectType)
    return list(kind.fields)


def _valid(name: str, kind: GraphQLInputType) -> str:
    """Return a JSON value that is valid for an argument."""
    named = get_named_type(kind)
    if name in ("after", "before", "last"):
        return "null"
    if name == "leaseToken":
        return f'"{LEASE_TOKEN}"'
    value = _VALID.get(named.name) or _object(_VALID_FIELDS.get(named.name, {}))
    return f"[{value}]" if "[" in str(kind) else value


def _selection(named: GraphQLNamedType, depth: int) -> str:
    """Return every field of a type down to a depth, without those that take arguments."""
    if isinstance(named, GraphQLUnionType):
        members = " ".join(
            f"... on {member.name} {_selection(member, depth)}" for member in named.types
        )
        return f"{{ __typename {members} }}"
    assert isinstance(named, GraphQLObjectType | GraphQLInterfaceType)
    names = [name for name, each in named.fields.items() if _is_leaf(each)]
    if depth > 0:
        names += [
            f"{name} {_selection(get_named_type(each.type), depth - 1)}"
            for name, each in named.fields.items()
            if not _is_leaf(each) and not any(map(is_required_argument, each.args.values()))
        ]
    return f"{{ __typename {' '.join(names)} }}"


def _is_leaf(each: GraphQLField) -> bool:
    return isinstance(get_named_type(each.type), GraphQLScalarType | GraphQLEnumType)


def _root_fields(*kinds: GraphQLObjectType | None) -> list[tuple[str, str, GraphQLField]]:
    return [
        (kind.name.lower(), name, each)
        for kind in kinds
        if kind is not None
        for name, each in kind.fields.items()
    ]


OPERATIONS: Final = _root_fields(_SCHEMA.query_type, _SCHEMA.mutation_type)
_SUBSCRIPTIONS: Final = _root_fields(_SCHEMA.subscription_type)


def _literal(text: str) -> str:
    """Return a JSON text as a literal of GraphQL."""
    return re.sub(r'"([A-Za-z_]\w*+)":', r"\1:", text)


@st.composite
def _operations(
    draw: st.DrawFn,
    size: int,
    *,
    as_literal: bool,
    operations: list[tuple[str, str, GraphQLField]] = OPERATIONS,
) -> tuple[str, dict[str, str]]:
    """Draw an operation with a hostile argument: its shape, and its request's members as JSON."""
    operation, name, each = draw(st.sampled_from(operations))
    arguments = _valid_arguments(each)
    shape = name
    if arguments:
        target = draw(st.sampled_from(sorted(arguments)))
        value = draw(_values(size))
        text = _text(value)
        named = get_named_type(each.args[target].type)
        place = target
        if isinstance(named, GraphQLInputObjectType) and draw(st.integers(0, 3)):
            valid = _VALID_FIELDS.get(named.name, {})
            inner, text = draw(_with_hostile_field(valid, list(named.fields), text))
            place += f".{inner}"
            if named.name in ("EnqueueJobInput", "TypedJobInput") and draw(st.booleans()):
                # The hostile value is a field of the payload.
                inner, text = draw(
                    _with_hostile_field(_PAYLOAD, ["sizes", *_PAYLOAD], _text(value))
                )
                place = f"{target}.payload.{inner}"
                key = "payload" if named.name == "EnqueueJobInput" else "thumbnailCreate"
                text = _object({**valid, key: text})
            if "[" in str(each.args[target].type):
                times = _fitting(draw(_TIMES), len(text.encode()) + 1, size)
                text = Repeated(text, times, before="[", separator=",", after="]").text
                place += f" ×{times:,}"
        arguments[target] = text
        shape += f" {place} {value}"
    aliases = draw(st.sampled_from((1, 1, 1, 2, 30, 31)))
    if as_literal:
        values, variables = _literals(arguments), "{}"
    else:
        values, variables = ", ".join(f"{arg}: ${arg}" for arg in arguments), _object(arguments)
        if arguments:
            types = ", ".join(f"${arg}: {of.type}" for arg, of in each.args.items())
            operation = f"{operation}({types})"
    depth = draw(st.sampled_from((0, 1, 3)))
    document = _document(operation, name, each, values, aliases=aliases, depth=depth)
    return f"{shape}, {aliases} aliases", {"query": json.dumps(document), "variables": variables}


@st.composite
def _graphql(draw: st.DrawFn, *, as_literal: bool) -> HttpRequest:
    shape, members = draw(_operations(BODY_LIMIT - 6_000, as_literal=as_literal))
    tail = draw(_CODINGS)
    kind = "graphql, literals" if as_literal else "graphql, variables"
    body = _body(_object(members), tail)
    return HttpRequest(kind, f"{shape} {tail!r}", "POST", "/graphql", _JSON, body)


def _doubling(n: int, *, on: str, before: str, body: str, end: str) -> Repeated:
    """Return fragments that spread each other twice: 2 ** n spreads, if each were followed."""
    unit = f"fragment f§ on {on} {{ {body} }} "
    return Repeated(unit, n, before=before, after=f"fragment f{n} on {on} {{ {end} }}")


_DOCUMENTS: Final[tuple[Callable[[int], Repeated], ...]] = (
    lambda n: Repeated(" ", n, after="{ jobTypes { name } }"),
    lambda n: Repeated(",\n", n, after="{ jobTypes { name } }"),
    lambda n: Repeated("#\n", n, after="{ jobTypes { name } }"),
    lambda n: Repeated("x", n, before="#"),
    lambda n: Repeated("{a", n),
    lambda n: Repeated("{a", n, tail="}"),
    lambda n: Repeated("[", n, before="{ a(b: ", tail="]", after=") }"),
    lambda n: Repeated("{a:", n, before="{ job(id: ", middle="1", tail="}", after=") { id } }"),
    lambda n: Repeated("a", n, before="{ ", after=" }"),
    lambda n: Repeated("é", n, before="{ ", after=" }"),
    lambda n: Repeated("jobTypo§ ", n, before="{ ", after=" }"),
    lambda n: Repeated("a§: jobTypes { name } ", n, before="{ ", after=" }"),
    lambda n: Repeated("jobTypes { name } ", n, before="{ ", after=" }"),
    lambda n: Repeated("@skip(if: false) ", n, before="{ jobTypes ", after="{ name } }"),
    lambda n: Repeated("@a§ ", n, before="{ jobTypes ", after="{ name } }"),
    lambda n: Repeated("$a§: Int ", n, before="query(", after=") { jobTypes { name } }"),
    lambda n: Repeated("query q§ { jobTypes { name } } ", n),
    lambda n: Repeated("...f§ ", n, before="{ ", after=" }"),
    lambda n: Repeated("fragment f§ on Query { ...f0 ...f1 } ", n, before="{ ...f0 } "),
    *(
        partial(_doubling, on=on, before=before, body=body, end=end)
        for on, before, end in (
            ("Query", "{ ...f0 } ", "jobTypes { name }"),
            ("JobType", "{ jobTypes { ...f0 } } ", "name"),
        )
        for body in ("...f¶ ...f¶", "... { ...f¶ } ... { ...f¶ }", "...f¶ __typename ... { ...f¶ }")
    ),
    lambda n: Repeated("... { ", n, before="{ jobTypes ", middle="name", tail="}", after=" }"),
    lambda n: Repeated("... on Query { ", n, before="{ ", middle="jobTypes { name }", tail="}"),
    lambda n: Repeated("x", n, before='{ job(id: "', after='") { __typename } }'),
    lambda n: Repeated("\\u{1F600}", n, before='{ job(id: "', after='") { __typename } }'),
    lambda n: Repeated("\n ", n, before='{ job(id: """', after='""") { __typename } }'),
    lambda n: Repeated('\\"""', n, before='{ job(id: """', after='""") { __typename } }'),
    lambda n: Repeated("9", n, before="{ jobs(first: ", after=") { nodes { id } } }"),
    lambda n: Repeated(
        '"a" ', n, before='{ jobs(filter: {types: ["a"', after="]}) { nodes { id } } }"
    ),
    lambda n: Repeated(
        "a§: jobs(first: 200) { nodes { id result progress } } ", n, before="{", after="}"
    ),
    lambda n: Repeated(
        "a§: result b§: progress ", n, before="{ jobs(first: 200) { nodes {", after="} } }"
    ),
    lambda n: Repeated(
        "a§: examplePayload b§: payloadSchema ", n, before="{ jobTypes {", after="} }"
    ),
    lambda n: Repeated("\0", n),
    lambda n: Repeated("\ufeff", n, after="{ jobTypes { name } }"),
    lambda n: Repeated(
        "ofType { ",
        n,
        before="{ __schema { types { fields { type { ",
        middle="name",
        tail="}",
        after="} } } } }",
    ),
)


@st.composite
def _documents(draw: st.DrawFn, size: int = BODY_LIMIT) -> Repeated:
    make = draw(st.sampled_from(_DOCUMENTS))
    length = len(json.dumps(make(2).text)) - len(json.dumps(make(1).text))
    few = st.sampled_from((1, 14, 28, 30, 101, 300, 600, 1_900))
    return make(_fitting(draw(st.one_of(few, _TIMES)), length + 6, size - 200))


@st.composite
def _graphql_documents(draw: st.DrawFn) -> HttpRequest:
    document = draw(_documents())
    body = _body(json.dumps({"query": document.text}))
    return HttpRequest("graphql, documents", str(document), "POST", "/graphql", _JSON, body)


_CHOSEN: Final = {"first": "200", "timeoutSeconds": "1"}
"""Arguments that need not be given: the largest page, and a short wait."""
_DEEPEST: Final = 4
_ALIASES: Final = st.sampled_from((1, 2, 14, 29))


@st.composite
def _selections(draw: st.DrawFn, named: GraphQLNamedType, depth: int, wide: int) -> str:
    """Draw what is selected of a type; at the depth `wide`, a field has many aliases."""
    if isinstance(named, GraphQLUnionType):
        members = " ".join(
            f"... on {member.name} {draw(_selections(member, depth, wide))}"
            for member in named.types
        )
        return f"{{ __typename {members} }}"
    assert isinstance(named, GraphQLObjectType | GraphQLInterfaceType)
    names = [name for name, each in named.fields.items() if depth > 0 or _is_leaf(each)]
    if not names:
        return "{ __typename }"
    drawn = draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    if "nodes" in names and "nodes" not in drawn:
        drawn.append("nodes")
    calls = [
        draw(_calls(named, name, depth, wide, draw(_ALIASES) if depth == wide and not n else 1))
        for n, name in enumerate(drawn)
    ]
    return f"{{ {' '.join(calls)} }}"


@st.composite
def _calls(
    draw: st.DrawFn,
    named: GraphQLObjectType | GraphQLInterfaceType,
    name: str,
    depth: int,
    wide: int,
    times: int,
) -> str:
    """Draw a field so many times."""
    each = named.fields[name]
    arguments = {
        argument: _CHOSEN.get(argument) or _literal(_valid(argument, of.type))
        for argument, of in each.args.items()
        if argument in _CHOSEN or is_required_argument(of)
    }
    call = f"{name}({', '.join(f'{a}: {v}' for a, v in arguments.items())})" if arguments else name
    kind = get_named_type(each.type)
    inner = "" if _is_leaf(each) else f" {draw(_selections(kind, depth - 1, wide))}"
    if times == 1:
        return call + inner
    return " ".join(f"{name}{number}: {call}{inner}" for number in range(times))


@st.composite
def _graphql_selections(draw: st.DrawFn) -> HttpRequest:
    """Draw a valid query, mostly of jobs, with many aliases of one field."""
    query = _SCHEMA.query_type
    assert query is not None
    name = draw(st.sampled_from(("jobs", "jobs", "jobs", "jobs", *query.fields)))
    wide = draw(st.integers(0, _DEEPEST))
    times = draw(_ALIASES) if wide == _DEEPEST else 1
    document = f"{{ {draw(_calls(query, name, _DEEPEST, wide, times))} }}"
    body = _body(json.dumps({"query": document}))
    return HttpRequest("graphql, selections", document, "POST", "/graphql", _JSON, body)


@st.composite
def _get(draw: st.DrawFn) -> HttpRequest:
    size = MAX_URL // 3
    if draw(st.booleans()):
        document = draw(_documents(size // 2))
        shape, members = str(document), {"query": json.dumps(document.text)}
    else:
        shape, members = draw(_operations(size // 2, as_literal=draw(st.booleans())))
    query = quote(json.loads(members["query"]).encode(errors="replace"))
    path = f"/graphql?query={query}"
    if "variables" in members:
        path += f"&variables={quote(members['variables'].encode(errors='replace'))}"
    headers = ((b"accept", draw(st.sampled_from((b"*/*", b"application/json")))),)
    return HttpRequest("get", shape, "GET", path[:MAX_URL], headers)


# WebSockets

_PROTOCOL_TYPES: Final = st.sampled_from(
    ("connection_init", "subscribe", "ping", "pong", "complete", "next", "connection_ack", "\0")
)


@st.composite
def _messages(draw: st.DrawFn, size: int) -> tuple[str, str | bytes]:
    """Draw a message that is hardly what the protocol expects."""
    value = draw(_values(size - 200))
    text = _text(value)
    place = draw(st.sampled_from(("message", "id", "type", "payload", "query", "Authorization")))
    kind = draw(_PROTOCOL_TYPES)
    message = {"type": json.dumps(kind), "id": '"1"', "payload": "{}"}
    if place in ("query", "Authorization"):
        message["payload"] = _object({place: text})
    elif place != "message":
        message[place] = text
    whole = text if place == "message" else _object(message)
    as_bytes = draw(st.integers(0, 5)) == 0
    shape = f"{'binary ' if as_bytes else ''}{kind}: {place} {value}"
    data = whole.encode(errors="replace")[:size]
    return shape, data if as_bytes else data.decode(errors="ignore")


@st.composite
def _before_init(draw: st.DrawFn) -> SocketMessages:
    size = draw(st.sampled_from((200, MAX_UNADMITTED, MAX_UNADMITTED * 2, BODY_LIMIT)))
    drawn = draw(st.lists(_messages(max(size, 400)), min_size=1, max_size=3))
    shape = "; ".join(shape for shape, _ in drawn)
    return SocketMessages("websocket, before", shape, tuple(text for _, text in drawn), False)


@st.composite
def _after_init(draw: st.DrawFn) -> SocketMessages:
    size = BODY_LIMIT - 6_000
    if draw(st.integers(0, 3)) == 0:
        shape, message = draw(_messages(size))
        return SocketMessages("websocket, after", shape, (message,), True)
    operations = OPERATIONS
    if draw(st.integers(0, 2)) == 0:
        document = draw(_documents(size))
        shape, members = str(document), {"query": json.dumps(document.text)}
    else:
        operations = draw(st.sampled_from((OPERATIONS, _SUBSCRIPTIONS)))
        as_literal = draw(st.booleans())
        shape, members = draw(_operations(size, as_literal=as_literal, operations=operations))
    payload = _object(members).encode(errors="replace").decode()
    times = _fitting(draw(st.sampled_from((1, 1, 2, 30, 101))), len(payload.encode()), size)
    messages = tuple(
        _object({"type": '"subscribe"', "id": f'"{n}"', "payload": payload}) for n in range(times)
    )
    ends = 0 if operations is _SUBSCRIPTIONS else times
    return SocketMessages("websocket, after", f"{times} × {shape}", messages, True, ends)


REQUESTS: Final[dict[str, st.SearchStrategy[Request]]] = {
    "rest": _rest(),
    "rest, routes": _rest_routes(),
    "uploads": _uploads(),
    "http": _http(),
    "graphql, variables": _graphql(as_literal=False),
    "graphql, literals": _graphql(as_literal=True),
    "graphql, documents": _graphql_documents(),
    "graphql, selections": _graphql_selections(),
    "get": _get(),
    "websocket, before": _before_init(),
    "websocket, after": _after_init(),
}
"""A strategy per kind of request."""


def draw_requests(kind: str, count: int, *, seed: int | None = None) -> list[Request]:
    """Draw so many requests of a kind, which are the same for the same seed."""
    requests: list[Request] = []

    @settings(
        max_examples=count + 1,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
    )
    @given(REQUESTS[kind])
    def draw(request: Request) -> None:
        requests.append(request)

    if seed is not None:
        # Each kind draws something else.
        draw = hypothesis.seed(seed * len(REQUESTS) + list(REQUESTS).index(kind))(draw)
    draw()
    return requests[1 : count + 1]  # The first is the simplest there is.


def plain_documents() -> list[str]:
    """Return each operation of the schema with valid literals and every field."""
    return [
        _document(operation, name, each, _literals(_valid_arguments(each)), aliases=1, depth=3)
        for operation, name, each in OPERATIONS + _SUBSCRIPTIONS
    ]


def _valid_arguments(each: GraphQLField) -> dict[str, str]:
    return {name: _valid(name, argument.type) for name, argument in each.args.items()}


def _literals(arguments: dict[str, str]) -> str:
    return ", ".join(f"{name}: {_literal(value)}" for name, value in arguments.items())


def _document(
    operation: str, name: str, each: GraphQLField, arguments: str, *, aliases: int, depth: int
) -> str:
    """Return a document with a field so many times. `operation` may define variables."""
    call = f"{name}({arguments})" if arguments else name
    calls = " ".join(f"a{n}: {call} {{ ...s }}" for n in range(aliases))
    kind = get_named_type(each.type)
    return f"{operation} {{ {calls} }} fragment s on {kind.name} {_selection(kind, depth)}"
