"""The faults: Python's come from Cosmic Ray's operators, dropped statements and those of SQL from
mutators of our own."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

# One replacement for each operator: eleven of a `+` notice the same fault eleven times. Those of
# `|` are left out: nearly all are of type annotations, which no test can notice.
PYTHON_OPERATORS: Final = (
    "core/AddNot",
    "core/ExceptionReplacer",
    "core/NumberReplacer",
    "core/RemoveDecorator",
    "core/ReplaceAndWithOr",
    "core/ReplaceOrWithAnd",
    "core/ReplaceBreakWithContinue",
    "core/ReplaceContinueWithBreak",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/ReplaceBinaryOperator_Add_Sub",
    "core/ReplaceBinaryOperator_Sub_Add",
    "core/ReplaceBinaryOperator_Mul_Div",
    "core/ReplaceBinaryOperator_Div_Mul",
    "core/ReplaceComparisonOperator_Eq_NotEq",
    "core/ReplaceComparisonOperator_NotEq_Eq",
    "core/ReplaceComparisonOperator_Lt_LtE",
    "core/ReplaceComparisonOperator_LtE_Lt",
    "core/ReplaceComparisonOperator_Gt_GtE",
    "core/ReplaceComparisonOperator_GtE_Gt",
    "core/ReplaceComparisonOperator_Is_IsNot",
    "core/ReplaceComparisonOperator_IsNot_Is",
    "core/ZeroIterationForLoop",
)

_OPERAND: Final = r"(?:CAST\([^()]*\)|[\w.]+\([^()]*\)|\{[^{}]*\}|'[^']*'|[:\w.]+)"
_COMPARISON: Final = (
    rf"(?:{_OPERAND}\s*(?:<=|>=|<>|=|<|>)\s*{_OPERAND}|[\w.]+ IS (?:NOT )?NULL"
    rf"|[\w.]+ IN \([^()]*\))"
)

# Not before an operator: what is left would be no SQL, which every test notices. `--` is none.
_END: Final = r"(?=\s|\)|$|;|\")(?!\s+(?:[+*/|]|-(?!-)))"

# No test can stop the clock at a microsecond.
_NOT_NOW: Final = r"(?! (?::?now\b|clock_timestamp\(|strftime\('[^']*', 'now'))"

# What is replaced, and by what; each place is a fault of its own. `{...}` is a placeholder of an
# f-string, such as `{d.skip_locked}`.
SQL_RULES: Final[tuple[tuple[str, str, str], ...]] = (
    ("SKIP LOCKED dropped", r"\s+SKIP LOCKED\b", ""),
    ("lock dropped", r"\s+FOR (?:NO KEY )?UPDATE(?: OF \w+)?(?: SKIP LOCKED| NOWAIT)?\b", ""),
    ("lock dropped", r"\s*\{d\.(?:skip_locked|lock_rows)\}", ""),
    ("advisory lock dropped", r"pg_(?:try_)?advisory_xact_lock(?:_shared)?\(", "pg_typeof("),
    ("condition dropped", rf"\s*\b(?:AND|OR)\s+{_COMPARISON}{_END}", ""),
    ("condition dropped", rf"(?<=\bWHERE )\s*{_COMPARISON}{_END}", "true"),
    ("condition dropped", rf"(?<=\bON )\s*{_COMPARISON}{_END}", "true"),
    ("comparison turned", r"(?<= )<=(?= )", ">"),
    ("comparison turned", r"(?<= )>=(?= )", "<"),
    ("comparison turned", r"(?<= )<>(?= )", "="),
    ("comparison turned", r"(?<= )<(?= )", ">="),
    ("comparison turned", r"(?<= )>(?= )", "<="),
    ("comparison turned", r"\bIS NOT NULL\b", "IS NULL"),
    ("comparison turned", r"\bIS NULL\b", "IS NOT NULL"),
    ("boundary moved", rf"(?<!\bnow )(?<= )<=(?= ){_NOT_NOW}", "<"),
    ("boundary moved", rf"(?<!\bnow )(?<= )>=(?= ){_NOT_NOW}", ">"),
    ("order turned", r"\bDESC\b", "ASC"),
    ("order dropped", r"\bORDER BY [^\n()]*?(?=\s+LIMIT\b|\s*\)|\n|\")", ""),
    ("bound dropped", r"\s+LIMIT (?::\w+|\{\w+\}|\d+|\w+)", ""),
    ("assignment dropped", r"\b\w+ = NULL,\s*", ""),
    ("sign turned", r"(?<=\w) \+ 1\b", " - 1"),
    ("sign turned", r"(?<=\w) - 1\b", " + 1"),
    ("default dropped", r"\bcoalesce\(([\w.]+), ", r"nullif(\1, "),
    ("bound turned", r"\bleast\(", "greatest("),
    ("bound turned", r"\bmin\(", "max("),
    ("bound turned", r"\bmax\(", "min("),
)

_IS_SQL: Final = re.compile(r"\b(?:SELECT|UPDATE|INSERT INTO|DELETE FROM|WHERE|WHEN)\b")
_COMMENT: Final = re.compile(r"--[^\n]*")


@dataclass(frozen=True)
class Mutant:
    """A file with one fault in it. `key` is the same as long as the file and the fault are.

    `make` gives the file's text with the fault; None where it cannot be put in after all.
    """

    path: Path
    line: int
    fault: str
    key: str
    make: Callable[[], str | None]


def python_mutants(path: Path, text: str) -> Iterator[Mutant]:
    """The file with each of Cosmic Ray's faults, and without one statement each."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    nodes = list(ast_nodes(get_ast(text)))
    nobodys = list(_not_behaviour(text))
    for name in PYTHON_OPERATORS:
        operator = get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, ((line, column), (end_line, end)) in enumerate(places):
            # Whether a bound is 8,000 or 8,001 is nobody's promise; whether it is 0 or 1 is.
            if name == "core/NumberReplacer" and (end_line != line or end - column > 1):
                continue
            if any(start <= (line, column) < finish for start, finish in nobodys):
                continue
            # The `*` before arguments that are given by name counts as an operator.
            if text.splitlines()[line - 1][column : column + 2] in ("*", "*,"):
                continue
            fault = f"{name.removeprefix('core/').removeprefix('Replace')} #{occurrence}"
            make = partial(_mutated_python, text, name, occurrence)
            yield Mutant(path, line, fault, _key(path, text, fault), make)
    for number, node in enumerate(_droppable(ast.parse(text))):
        if any(start <= (node.lineno, node.col_offset) < finish for start, finish in nobodys):
            continue
        start, end = _place(text, node)
        told = f"statement dropped: {' '.join(text[start:end].split())[:80]}"
        # As many lines as before, so that the numbers of the others stay.
        mutated = text[:start] + "pass" + "\n" * text.count("\n", start, end) + text[end:]
        key = _key(path, text, f"statement dropped #{number}")
        yield Mutant(path, node.lineno, told, key, partial(str, mutated))


def _droppable(tree: ast.Module) -> Iterator[ast.stmt]:
    """Return the statements of functions without which the file is still valid: calls, raises,
    assignments to what outlives the function, and returns under a condition."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for statement, parent in _statements(tree, None):
        match statement:
            case ast.Expr(value=ast.Call() | ast.Await()):
                found = True
            case ast.Raise() | ast.Delete() | ast.AugAssign():
                found = True
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                found = True
            case ast.Return(value=ast.expr()):
                found = not isinstance(parent, functions)
            case _:
                found = False
        if found and parent is not None:
            yield statement


def _statements(node: ast.AST, parent: ast.AST | None) -> Iterator[tuple[ast.stmt, ast.AST | None]]:
    """Return the statements below a node, each with its block; None for those of no function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child, parent
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _statements(child, child)
        elif isinstance(child, ast.ClassDef):
            yield from _statements(child, None)
        else:
            inside = isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case)
            yield from _statements(child, child if inside and parent is not None else parent)


def _place(text: str, node: ast.stmt | ast.expr) -> tuple[int, int]:
    """Return where a node begins and ends in the text. Columns of the tree count bytes."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    lines = text.splitlines(keepends=True)

    def place(line: int, column: int) -> int:
        before = len(lines[line - 1].encode()[:column].decode())
        return sum(map(len, lines[: line - 1])) + before

    return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)


def _not_behaviour(text: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a file has nothing that a test is to notice: log lines, `__repr__`, and what is there
    for the type checker or saves memory."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(
                value=ast.Call(
                    func=ast.Attribute(
                        value=ast.Name(id="log" | "_log") | ast.Attribute(attr="log" | "_log")
                    )
                )
            ):
                yield _span(node)
            case ast.Call(func=ast.Name(id="zip"), keywords=keywords):
                # `strict=True` asserts something about the code itself.
                yield from (_span(each) for each in keywords if _is_true(each.value))
            case ast.FunctionDef(name="__repr__") | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield _span(node)
            case ast.Call(func=ast.Name(id="dataclass"), keywords=keywords):
                yield from map(_span, keywords)
            case ast.Name(id="abstractmethod" | "final" | "overload" | "override"):
                # The place of a decorator begins at the @.
                (line, column), end = _span(node)
                yield (line, max(0, column - 1)), end


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _span(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    assert isinstance(node, ast.stmt | ast.expr | ast.keyword)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _mutated_python(text: str, name: str, occurrence: int) -> str | None:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    try:
        mutated: str | None = mutate_code(text, get_operator(name)(), occurrence)
    except AttributeError:
        # Cosmic Ray's replacement of exceptions knows no dotted names.
        return None
    return mutated


def replaced(text: str) -> set[str]:
    """The functions and triggers of earlier migrations that this one replaces.

    A trigger is replaced by one of the same name.
    """
    functions = re.findall(r"^CREATE OR REPLACE FUNCTION (\w+)", text, re.M)
    return {*functions, *_triggers(text)}


def _triggers(text: str) -> list[str]:
    return re.findall(r"\bCREATE TRIGGER (\w+) ", text)


def sql_mutants(
    path: Path, text: str, left_out: AbstractSet[str] = frozenset()
) -> Iterator[Mutant]:
    """The file with each of our own faults in its SQL: all of a .sql, the strings of a .py.

    `left_out` are functions and triggers that a later migration has replaced: they do not run.
    """
    if path.suffix == ".sql":
        spans = list(_in_force(text, left_out))
    else:
        spans = [
            (start, end)
            for start, end in _sql_strings(text)
            if left_out.isdisjoint(_triggers(text[start:end]))
        ]
    seen: set[str] = set()
    for start, end in spans:
        comments = [found.span() for found in _COMMENT.finditer(text, start, end)]
        for fault, pattern, replacement in SQL_RULES:
            for found in re.compile(pattern, re.M).finditer(text, start, end):
                if any(a <= found.start() < b for a, b in comments):
                    continue
                if _makes_no_difference(text, fault, found):
                    continue
                mutated = text[: found.start()] + found.expand(replacement) + text[found.end() :]
                if mutated not in seen:
                    seen.add(mutated)
                    line = text.count("\n", 0, found.end() - len(found[0].lstrip())) + 1
                    told = f"{fault}: {' '.join(found[0].split())}"
                    key = _key(path, text, f"{fault} at {found.start()}")
                    yield Mutant(path, line, told, key, partial(str, mutated))


def _makes_no_difference(text: str, fault: str, found: re.Match[str]) -> bool:
    """Return whether the database gives the same rows without it, whatever the tables have."""
    statement = text[text.rfind(";", 0, found.start()) + 1 : found.start()]
    match fault:
        case "bound dropped":
            # SELECT INTO of PL/pgSQL takes the first row, and reads no further.
            is_last = found[0].strip() == "LIMIT 1" and text.startswith(";", found.end())
            return is_last and re.search(r"\bSELECT\b[^()]*\bINTO\b", statement) is not None
        case "order dropped":
            # The rows of a function come in the order of their numbers.
            rest = text[found.end() : text.find(";", found.end())]
            numbers = re.findall(r"WITH ORDINALITY AS (\w+) \(\w+, (\w+)\)", rest)
            if found[0] in {f"ORDER BY {alias}.{number}" for alias, number in numbers}:
                return True
            # What is only counted has no order; it may choose the index.
            counted = r"count\(\*\) FROM \(\s*SELECT 1 FROM (?:[^()]|\([^()]*\))*$"
            return re.search(counted, statement) is not None
    return False


def _in_force(text: str, left_out: AbstractSet[str]) -> Iterator[tuple[int, int]]:
    """Where a .sql has statements, but for those that make the functions that are left out."""
    starts = [found.start() for found in re.finditer(r"^CREATE ", text, re.M)]
    for start, end in pairwise([0, *starts, len(text)]):
        made = re.match(r"CREATE (?:OR REPLACE )?FUNCTION (\w+)", text[start:end])
        if made is None or made[1] not in left_out:
            yield start, end


def _sql_strings(text: str) -> Iterator[tuple[int, int]]:
    """Where the strings of a Python file stand that hold SQL; docstrings do not count."""
    starts = [0]
    for each in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(each.encode()))
    encoded = text.encode()
    tree = ast.parse(text)
    described = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    inner = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for child in ast.walk(node)
        if child is not node
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        if not is_text or id(node) in described or id(node) in inner:
            continue
        assert isinstance(node, ast.expr)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        first = starts[node.lineno - 1] + node.col_offset
        last = starts[node.end_lineno - 1] + node.end_col_offset
        start, end = len(encoded[:first].decode()), len(encoded[:last].decode())
        if _IS_SQL.search(text, start, end):
            yield start, end


def _key(path: Path, text: str, fault: str) -> str:
    return hashlib.sha256(f"{path}\0{text}\0{fault}".encode()).hexdigest()[:16]
