"""Libraries are used by their public names: nothing private is read, and nothing is patched."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("job_registry", "job_registry_api")

# What a library documents, for all that its name begins with an underscore.
DOCUMENTED = {
    "_asdict",  # Of named tuples.
    "_replace",  # The same.
    "_mapping",  # Of a row of SQLAlchemy.
    "_exit",  # Of `os`.
    "_current_frames",  # Of `sys`.
    "__tablename__",  # Of a table of SQLAlchemy.
}
# Python's own data model. What else has two underscores, a library has made up.
PYTHON = re.compile(
    r"__(name|qualname|module|path|file|doc|dict|class|cause|context|suppress_context|traceback"
    r"|annotations|await|setattr|init|call)__"
)
SCHEMA = ("api/graphql/schema.py", "schema._schema")
"""Strawberry has no public name for it."""

REPLACED = {
    "sys.argv[1:]",  # By `first_minute`, which runs the command as if it were called so.
    "sys.stderr",  # By the command, if it was closed before the start.
}


def private_reads(source: str) -> Iterator[tuple[int, str]]:
    """Attributes with a leading underscore, of anything but our own classes and modules."""
    tree = ast.parse(source)
    own = {"self", "cls"} | {
        node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and _is_ours(node.module):
            own |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(ast.Name(owner)) if owner in own:
                continue
            case ast.Attribute(ast.Call(ast.Name("super" | "type"))) if not node.attr.startswith(
                "__"
            ):
                continue
            case ast.Attribute(attr=name) if (
                name.startswith("_") and name not in DOCUMENTED and not PYTHON.fullmatch(name)
            ):
                yield node.lineno, ast.unparse(node)


def patches(source: str) -> Iterator[tuple[int, str]]:
    """Assignments to, and deletions of, what an imported module of a library has."""
    tree = ast.parse(source)
    imported = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                imported |= {
                    alias.asname or alias.name.partition(".")[0]
                    for alias in names
                    if not _is_ours(alias.name)
                }
            case ast.ImportFrom(module=str(module), names=names) if not _is_ours(module):
                imported |= {alias.asname or alias.name for alias in names}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=targets) | ast.Delete(targets=targets):
                pass
            case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
                targets = [target]
            case ast.Call(ast.Name("setattr" | "delattr"), [target, *_]):
                targets = [target]
            case _:
                continue
        for target in targets:
            is_call = isinstance(node, ast.Call)
            if (is_call or not isinstance(target, ast.Name)) and _root(target) in imported:
                yield node.lineno, ast.unparse(target)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in OURS


def _root(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def python_files() -> list[Path]:
    return [
        path
        for folder in ("api", "registry")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "node_modules" not in path.parts
    ]


@pytest.mark.slow
def test_nothing_private_of_a_library_is_read_but_strawberrys_schema_in_one_place() -> None:
    found = [
        (path.relative_to(ROOT).as_posix(), text)
        for path in python_files()
        for _, text in private_reads(path.read_text())
    ]
    assert found == [SCHEMA]


@pytest.mark.slow
def test_nothing_of_a_library_is_patched() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in python_files()
        for line, text in patches(path.read_text())
        if text not in REPLACED
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "strawberry.Schema(query=Query)._schema",
        "for value in enum.__strawberry_definition__.values: pass",
        "self._connection._protocol",
        "loop._ready",
        "super().__secret__",
    ],
)
def test_a_private_attribute_is_found(source: str) -> None:
    assert list(private_reads(source))


@pytest.mark.parametrize(
    "source",
    [
        "import graphql\ngraphql.parse = None",
        "from graphql.type import introspection\n"
        "introspection.introspection_types['__Type'].fields['isOneOf'] = field",
        "from graphql.type import introspection\ndel introspection.introspection_types['__Type']",
        "import os.path\nos.path.sep += '/'",
        "from graphql import GraphQLObjectType\nsetattr(GraphQLObjectType, 'is_type_of', None)",
    ],
)
def test_a_patch_is_found(source: str) -> None:
    assert list(patches(source))


@pytest.mark.parametrize(
    "source",
    [
        "self._names, cls._names, type(self).__name__, error.__cause__",
        "from job_registry_api import rest\nrest._names",
        "class Own: pass\nOwn._names",
        "row._replace(a=1), row._mapping",
    ],
)
def test_what_is_our_own_or_documented_is_no_private_attribute(source: str) -> None:
    assert not list(private_reads(source))
