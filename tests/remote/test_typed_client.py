"""The examples of workers have the types of the schema.

The one in TypeScript generates them. The one in Python writes them down, and is compared here.
"""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from types import UnionType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import pytest
from graphql import (
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLType,
    GraphQLUnionType,
    build_schema,
    get_nullable_type,
    is_list_type,
    is_non_null_type,
    parse,
    validate,
)

from job_registry_api.graphql.schema import SDL_FILE
from tests import ROOT
from tests.docs.pages import WORKERS

_spec = spec_from_file_location("protocol", WORKERS / "python" / "protocol.py")
assert _spec is not None
assert _spec.loader is not None
protocol: Final[Any] = module_from_spec(_spec)
_spec.loader.exec_module(protocol)

SCHEMA: Final[GraphQLSchema] = build_schema(SDL_FILE.read_text("utf-8"))
SCALARS: Final = {
    "ID": str,
    "String": str,
    "Int": int,
    "Float": float,
    "Boolean": bool,
    "JSON": Any,
}
OBJECTS: Final = [
    each
    for each in vars(protocol).values()
    if isinstance(each, type) and isinstance(SCHEMA.type_map.get(each.__name__), GraphQLObjectType)
]
ANSWERS: Final = {
    "LEASE": ("leaseJobs", protocol.LeaseJobsResult),
    "STOP_WAITING": ("stopWaiting", protocol.StopWaitingResult),
    "HEARTBEAT": ("heartbeatJob", protocol.HeartbeatJobResult),
    "COMPLETE": ("completeJob", protocol.EndResult),
    "FAIL": ("failJob", protocol.EndResult),
    "SNOOZE": ("snoozeJob", protocol.EndResult),
    "RELEASE": ("releaseJob", protocol.EndResult),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_document_is_valid(name: str) -> None:
    text = getattr(protocol, name) + ("" if name == "RELEASE" else protocol.INVALID)
    assert validate(SCHEMA, parse(text)) == []


@pytest.mark.parametrize("typed", OBJECTS, ids=lambda each: each.__name__)
def test_a_class_has_the_types_of_the_schema(typed: type) -> None:
    graphql_type = SCHEMA.type_map[typed.__name__]
    assert isinstance(graphql_type, GraphQLObjectType)
    for name, hint in get_type_hints(typed, vars(protocol)).items():
        if name == "kind":
            assert hint == Literal[typed.__name__]
        else:
            assert hint == _hint(graphql_type.fields[name].type)


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_has_every_member_of_the_union(name: str) -> None:
    field, answer = ANSWERS[name]
    mutation = SCHEMA.mutation_type
    assert mutation is not None
    union = get_nullable_type(mutation.fields[field].type)
    assert isinstance(union, GraphQLUnionType)
    assert get_origin(answer) is UnionType
    members = {each.__name__ for each in get_args(answer)}
    # The four reports share a type.
    needed = {each.name for each in union.types}
    assert members == needed or (name == "RELEASE" and needed < members)


def test_the_packages_are_those_that_the_tests_have() -> None:
    frontend = json.loads((ROOT / "tests/frontend/package.json").read_text())["devDependencies"]
    needed = json.loads((WORKERS / "typescript/package.json").read_text())["devDependencies"]
    assert needed.items() <= frontend.items()


def _hint(graphql_type: GraphQLType) -> Any:
    """Return the Python type of a type of the schema, all of which are required here."""
    assert is_non_null_type(graphql_type)
    inner: Any = graphql_type.of_type
    if is_list_type(inner):
        list_of: Any = list
        return list_of[_hint(inner.of_type)]
    return SCALARS.get(inner.name) or getattr(protocol, inner.name)
