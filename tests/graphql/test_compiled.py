"""Compiled operations answer as graphql-core does, and run every resolver once.

The schema here has nothing to do with jobs, and has resolvers that fail in every way.
"""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import Enum
from inspect import isawaitable
from random import Random
from typing import Annotated, Any, NewType, TypeVar

import pytest
import strawberry
from graphql import (
    ExecutionResult,
    GraphQLObjectType,
    OperationDefinitionNode,
    OperationType,
    execute,
    parse,
    specified_rules,
    validate,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strawberry.dataloader import DataLoader
from strawberry.extensions import FieldExtension
from strawberry.schema.config import StrawberryConfig
from strawberry.schema.validation_rules.one_of import OneOfInputValidationRule
from strawberry.types.field import StrawberryField

from job_registry_api.graphql.compiled import (
    CompiledOperation,
    Compiler,
    Different,
    Resumable,
    StrawberryClasses,
    built_directly,
)
from job_registry_api.graphql.compiled.outputs import Direct
from job_registry_api.graphql.schema import executable
from tests.graphql.random_operations import RandomOperation

Value = TypeVar("Value")


class Faulty(Exception):
    pass


@strawberry.enum
class Colour(Enum):
    RED = "red"
    GREEN = strawberry.enum_value("green", name="VERT")


Money = NewType("Money", int)


def parsed_money(value: object) -> int:
    if not isinstance(value, str) or not value.endswith("EUR"):
        raise ValueError("Expected euros.")
    return int(value[:-3])


def formatted_money(value: object) -> str:
    if not isinstance(value, int):
        raise ValueError("Expected a number.")
    return f"{value}EUR"


MONEY = strawberry.scalar(
    name="Money",
    serialize=formatted_money,
    parse_value=parsed_money,
)


@dataclass
class Context:
    """What the resolvers of one execution have done, and at which calls they fail."""

    faults: dict[str, str] = field(default_factory=dict)
    called: Counter[str] = field(default_factory=Counter)
    loads: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loader: DataLoader[int, int] = DataLoader(load_fn=self._load)

    async def _load(self, keys: list[int]) -> list[int]:
        self.loads.append(keys)
        return [key * 10 for key in keys]

    def at(self, info: strawberry.Info[Any, None], name: str, value: Value) -> Value:
        """The value of a resolver, or what its fault makes of it."""
        instead: dict[str, Any] = {"null": None, "odd": object(), "error": Faulty(name)}
        self.called[" ".join([name, "at", *map(str, info.path.as_list())])] += 1
        fault = self.faults.get(name)
        if fault == "raise":
            raise Faulty(name)
        faulty: Value = instead.get(fault or "", value)
        return faulty

    @property
    def mutations(self) -> list[str]:
        """The calls of root fields of a mutation, in order."""
        return [each for each in self.called if each.startswith(("add", "put"))]


Info = strawberry.Info[Context, None]


class Called(Resumable):
    """The outermost extension of fields that are called directly."""

    def resolve(
        self, next_: Callable[..., Any], source: object, info: Info, **arguments: object
    ) -> object:
        before = self.call_before()
        if before is not None:
            return self.outcome_of(before, arguments)
        return next_(source, info, **arguments)

    async def resolve_async(
        self, next_: Callable[..., Any], source: object, info: Info, **arguments: object
    ) -> object:
        before = self.call_before()
        if before is not None:
            return self.outcome_of(before, arguments)
        return await next_(source, info, **arguments)


class Within(FieldExtension):
    """An extension within it, which runs once like the resolver."""

    def resolve(
        self, next_: Callable[..., Any], source: object, info: Info, **arguments: object
    ) -> object:
        info.context.called[" ".join(["within", *map(str, info.path.as_list())])] += 1
        return info.context.at(info, f"within {info.field_name}", next_(source, info, **arguments))

    async def resolve_async(
        self, next_: Callable[..., Any], source: object, info: Info, **arguments: object
    ) -> object:
        info.context.called[" ".join(["within", *map(str, info.path.as_list())])] += 1
        return await next_(source, info, **arguments)


class Checking(Resumable):
    """An extension that only checks."""

    def check(self, source: object, info: strawberry.Info[Any, Any]) -> None:
        # It is not counted: a check may run again if the resolver has not begun.
        if info.context.faults.get(f"check {info.field_name}") == "raise":
            raise Faulty("check")

    def resolve(
        self, next_: Callable[..., Any], source: object, info: Info, **arguments: object
    ) -> object:
        before = self.call_before()
        if before is not None:
            return self.outcome_of(before, arguments)
        self.check(source, info)
        return next_(source, info, **arguments)

    async def resolve_async(
        self, next_: Callable[..., Any], source: object, info: Info, **arguments: object
    ) -> object:
        before = self.call_before()
        if before is not None:
            return self.outcome_of(before, arguments)
        self.check(source, info)
        return await next_(source, info, **arguments)


DIRECT: list[FieldExtension] = [Within(), Called()]


@built_directly
@strawberry.input
class Factor:
    by: int
    unit_name: str | None = strawberry.UNSET
    least: int = 2
    most: int | None


@strawberry.type
class Checked:
    number: int


@strawberry.type
class Refused:
    why: str


@strawberry.interface
class Named:
    name: str


@strawberry.type
class Part(Named):
    number: int

    @strawberry.field
    async def tenfold(self, info: Info) -> int | None:
        return info.context.at(info, "tenfold", await info.context.loader.load(self.number))

    @strawberry.field
    def sure(self, info: Info) -> int:
        value: int = info.context.at(info, "sure", self.number)
        return value

    @strawberry.field(extensions=DIRECT)
    def times(self, info: Info, factor: Factor | None = None) -> int:
        by = factor.by if factor is not None else 1
        value: int = info.context.at(info, "times", self.number * by)
        return value

    @strawberry.field(extensions=[Checking()])
    def weight(self, info: Info) -> int | None:
        return info.context.at(info, "weight", self.number)

    @strawberry.field(extensions=[Checking()])
    async def guarded(
        self, info: Info, factor: int = 1
    ) -> Annotated[Checked | Refused, strawberry.union("CheckedOrRefused")] | None:
        return Checked(number=info.context.at(info, "guarded", self.number * factor))

    @strawberry.field(extensions=DIRECT)
    def checked(self) -> Annotated[Checked | Refused, strawberry.union("CheckedOrRefused")]:
        if self.number == 2:
            raise Faulty("checked")
        return Checked(number=self.number)


@strawberry.type
class Other(Named):
    colours: list[Colour | None]
    price: Money | None = strawberry.field(default=None, extensions=DIRECT)


Thing = Annotated[Part | Other, strawberry.union("Thing")]


@strawberry.input
class Point:
    x: int = 1
    y: float | None = None
    tags: list[str] = strawberry.field(default_factory=lambda: ["a", "b"])


@strawberry.input
class Tree:
    value: str
    colour: Colour = Colour.RED
    children: list[Tree] | None = None
    at: Point | None = strawberry.UNSET


@strawberry.input(one_of=True)
class Choice:
    number: int | None = strawberry.UNSET
    points: list[Point] | None = strawberry.UNSET


def plain(value: Any) -> Any:
    if isinstance(value, Tree | Point | Choice | Factor):
        return {name: plain(each) for name, each in vars(value).items()}
    return [plain(each) for each in value] if isinstance(value, list) else repr(value)


@strawberry.type
class Whole(Named):
    ratio: float
    count: int | None
    when: datetime
    grid: list[list[int]]
    part: Part
    maybe: Part | None
    things: list[Thing | None]
    named: list[Named]

    @strawberry.field(extensions=DIRECT)
    async def later(self, info: Info, wait: int = 0) -> Whole | None:
        for _ in range(wait):
            await asyncio.sleep(0)
        return info.context.at(info, "later", whole())

    @strawberry.field
    async def surely(self, info: Info) -> Part:
        await asyncio.sleep(0)
        part: Part = info.context.at(info, "surely", Part(name="sure", number=3))
        return part


def whole() -> Whole:
    things: list[Part | Other | None] = [
        Part(name=f"part {number}", number=number) for number in range(3)
    ]
    others = Other(name="other", colours=[Colour.RED, None, Colour.GREEN], price=Money(7))
    return Whole(
        name="whole",
        ratio=0.5,
        count=None,
        when=datetime(2030, 1, 31),
        grid=[[1, 2], [], [3]],
        part=Part(name="inner", number=9),
        maybe=None,
        things=[*things, None, others],
        named=[others, Part(name="named", number=4)],
    )


class Handler:
    """Answers `Faulty` as data, where a field can return it."""

    exception_type = Faulty
    error_type = Refused

    def handle(self, exception: Faulty, *, field: StrawberryField, info: Info) -> Refused:
        return Refused(why=str(exception))


@strawberry.type
class Query:
    @strawberry.field
    async def whole(self, info: Info) -> Whole | None:
        return info.context.at(info, "whole", whole())

    @strawberry.field
    def direct(self, info: Info) -> Whole:
        result: Whole = info.context.at(info, "direct", whole())
        return result

    @strawberry.field(extensions=DIRECT)
    async def thing(self, info: Info, number: int = 1) -> Thing | None:
        return info.context.at(info, "thing", whole().things[number % 5])

    @strawberry.field(extensions=DIRECT)
    async def told(
        self,
        info: Info,
        tree: Tree | None = None,
        trees: list[Tree] | None = None,
        point: Point | None = None,
        choice: Choice | None = None,
        colour: Colour = Colour.GREEN,
        money: Money | None = None,
        money_by_default: Money = Money(5),
        ids: list[strawberry.ID] | None = None,
        matrix: list[list[int | None]] | None = None,
        flag: bool | None = True,
        ratio: float = 1.5,
        text: str | None = "text",
        factor: Factor | None = None,
        factors: list[Factor] | None = None,
    ) -> str | None:
        given = [tree, trees, point, choice, colour, money, money_by_default, factor, factors]
        more = [ids, matrix, flag, ratio, text]
        return info.context.at(info, "told", repr([plain(each) for each in [*given, *more]]))


@strawberry.type
class Mutation:
    @strawberry.mutation(extensions=DIRECT)
    async def add(self, info: Info, number: int) -> Part | None:
        return info.context.at(info, f"add {number}", Part(name="added", number=number))

    @strawberry.mutation(extensions=DIRECT)
    async def put_point(
        self, info: Info, point: Point
    ) -> Annotated[Part | Refused, strawberry.union("PartOrRefused")]:
        part: Part = info.context.at(info, "put_point", Part(name="put", number=point.x))
        return part

    @strawberry.mutation
    def put(self, info: Info, number: int) -> Part:
        part: Part = info.context.at(info, f"put {number}", Part(name="put", number=number))
        return part


RULES = [*specified_rules, OneOfInputValidationRule]
STRAWBERRY = strawberry.Schema(
    query=Query,
    mutation=Mutation,
    types=[Other, Part],
    config=StrawberryConfig(scalar_map={Money: MONEY}),
    exception_handlers=[Handler()],
)
SCHEMA = executable(STRAWBERRY)


CLASSES = StrawberryClasses(STRAWBERRY)


def compiled(text: str, classes: StrawberryClasses = CLASSES) -> CompiledOperation | None:
    document = parse(text)
    assert validate(SCHEMA, document, RULES) == []
    operation = document.definitions[0]
    assert isinstance(operation, OperationDefinitionNode)
    return Compiler(SCHEMA, classes).compile(document, operation)


async def by_graphql_core(text: str, context: Context, /, **variables: Any) -> ExecutionResult:
    result = execute(SCHEMA, parse(text), context_value=context, variable_values=variables)
    return await result if isawaitable(result) else result


def shown(result: ExecutionResult) -> tuple[str, list[str]]:
    errors = [repr(error.formatted) for error in result.errors or ()]
    return repr(result.data), sorted(errors)


def alike(result: ExecutionResult, expected: ExecutionResult) -> bool:
    """Whether both have the same data and errors.

    When nulls of two fields spread to the same place, one error is enough by the specification
    (6.4.4). graphql-core has both if the second field fails before the first one is abandoned.
    """
    (data, errors), (expected_data, expected_errors) = shown(result), shown(expected)
    if data != expected_data or bool(errors) != bool(expected_errors):
        return False
    fewer, more = sorted((errors, expected_errors), key=len)
    return fewer == more or (result.data is None and set(fewer) < set(more))


async def background_work() -> None:
    """Let graphql-core end what it abandons."""
    for _ in range(10):
        await asyncio.sleep(0)


async def same(text: str, faults: dict[str, str] | None = None, /, **variables: Any) -> bool:
    """Execute an operation by graphql-core, and compiled; return whether it stayed compiled.

    When a null spreads, graphql-core abandons resolvers that run; the compiled operation may have
    run them to their end. Each runs once, and of a mutation the same root fields run.
    """
    operation = compiled(text)
    assert operation is not None
    ours, theirs, again = (Context(faults or {}) for _ in range(3))
    expected = await by_graphql_core(text, theirs, **variables)
    result = await operation.execute(ours, variables)
    assert alike(result, expected), (shown(result), shown(expected))
    verified, left = await operation.verify(again, variables)
    assert alike(verified, expected), (shown(verified), shown(expected))
    await background_work()
    for each in (ours, again):
        assert not each.called or max(each.called.values()) == 1
        assert each.mutations == theirs.mutations
        if not expected.errors:
            assert each.called == theirs.called
    return left is None


EVERYTHING = """{ __typename
  whole { ...All later { ...All later(wait: 2) { name } } surely { name tenfold } }
  direct { ...All } a: thing { ...T } b: thing(number: 4) { ...T } }
fragment All on Whole { __typename name ratio count when grid part { ...P } maybe { ...P }
  things { ...T } named { n: name __typename ... on Named { name } ... on Part { number } } }
fragment P on Part { name number tenfold sure times(factor: {by: 3}) weight
  guarded(factor: 2) { ... on Checked { number } ... on Refused { why } } }
fragment T on Thing { __typename ... on Named { name } ... on Part { ...P }
  ... on Other { colours price } }"""


async def test_every_kind_of_value_is_answered_as_by_graphql_core() -> None:
    assert await same(EVERYTHING)


@pytest.mark.cases(16)
@pytest.mark.parametrize("fault", ["raise", "null", "odd", "error"])
@pytest.mark.parametrize(
    "name",
    [
        *("whole", "direct", "thing", "later", "surely", "tenfold", "sure", "times"),
        *("within times", "within price", "check weight", "weight", "check guarded", "guarded"),
    ],
)
async def test_what_is_odd_is_left_to_graphql_core_and_no_resolver_runs_twice(
    name: str, fault: str
) -> None:
    stayed = await same(EVERYTHING, {name: fault})
    stays: tuple[str, ...] = ("null",)
    if name.startswith("check"):  # It raises or does nothing.
        stays = ("null", "odd", "error")
    elif name == "guarded":  # Its error is data.
        stays = ("raise",)
    elif name in ("direct", "surely", "sure", "times", "within times"):  # They are non-null.
        stays = ()
    assert stayed == (fault in stays)


MUTATIONS = """mutation { a: add(number: 1) { name tenfold } b: add(number: 2) { tenfold sure }
  c: add(number: 3) { sure __typename } d: put(number: 4) { number } e: add(number: 5) { name } }"""


@pytest.mark.parametrize("fault", ["raise", "null", "odd", "error"])
@pytest.mark.parametrize("number", ["add 1", "add 2", "add 3", "put 4", "add 5", "sure"])
async def test_no_mutation_runs_twice_when_one_of_several_fails(number: str, fault: str) -> None:
    await same(MUTATIONS, {number: fault})


PUT_POINT = """mutation($x: Int!) { putPoint(point: {x: $x, tags: ["c"]}) {
  __typename ... on Part { number tenfold } ... on Refused { why } } }"""


async def test_an_error_of_a_direct_call_is_answered_as_data_where_strawberry_does() -> None:
    assert CLASSES.direct_of("Mutation", "putPoint") is not None
    assert await same(PUT_POINT, x=7)
    assert await same(PUT_POINT, {"put_point": "raise"}, x=7)
    operation = compiled(PUT_POINT)
    assert operation is not None
    result = await operation.execute(Context({"put_point": "raise"}), {"x": 7})
    assert result.data == {"putPoint": {"__typename": "Refused", "why": "put_point"}}


CHECKED = """{ whole { things { ... on Part {
  checked { __typename ... on Checked { number } ... on Refused { why } } } } } }"""


async def test_an_error_of_a_direct_call_at_once_is_answered_as_data_where_strawberry_does() -> (
    None
):
    direct = CLASSES.direct_of("Part", "checked")
    assert direct is not None
    assert not direct.is_async
    assert not await same(CHECKED)
    operation = compiled(CHECKED)
    assert operation is not None
    result = await operation.execute(Context(), {})
    assert result.errors is None
    assert result.data is not None
    assert result.data["whole"]["things"][1:3] == [
        {"checked": {"__typename": "Checked", "number": 1}},
        {"checked": {"__typename": "Refused", "why": "checked"}},
    ]


@pytest.mark.parametrize("name", ["whole", "direct", "name", "unknown"])
def test_a_resolver_without_a_resumable_extension_is_not_called_directly(name: str) -> None:
    assert CLASSES.direct_of("Query", name) is None


@pytest.mark.parametrize(
    ("text", "difference"),
    [
        ("mutation { add(number: 7) { number } }", "'number': 8"),
        ("{ whole { part { times(factor: {by: 7}) } } }", "'factor': 8"),
    ],
)
async def test_the_verify_mode_finds_arguments_that_strawberry_converts_differently(
    text: str, difference: str
) -> None:
    class Wrong(StrawberryClasses):
        def direct_of(self, type_name: str, field_name: str) -> Direct | None:
            direct = super().direct_of(type_name, field_name)
            if direct is None:
                return None

            def converted(info: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                own_info, arguments = direct.converted(info, given)
                return own_info, dict.fromkeys(arguments, 8)

            return direct._replace(converted=converted)

    operation = compiled(text, Wrong(STRAWBERRY))
    assert operation is not None
    with pytest.raises(Different, match=difference):
        await operation.verify(Context(), {})


async def test_mutations_run_in_order_and_a_null_in_a_non_null_stops_the_rest() -> None:
    context = Context({"put 4": "null"})
    operation = compiled(MUTATIONS)
    assert operation is not None
    result = await operation.execute(context, {})
    await background_work()
    assert result.data is None
    assert context.mutations == ["add 1 at a", "add 2 at b", "add 3 at c", "put 4 at d"]


async def test_a_level_of_objects_is_loaded_at_once() -> None:
    context = Context()
    operation = compiled("{ whole { things { ... on Part { tenfold } } part { tenfold } } }")
    assert operation is not None
    await operation.execute(context, {})
    assert [sorted(keys) for keys in context.loads] == [[0, 1, 2, 9]]


TOLD = """query ($tree: Tree, $trees: [Tree!], $point: Point, $choice: Choice,
  $colour: Colour! = RED, $money: Money, $ids: [ID!], $matrix: [[Int]!], $flag: Boolean,
  $ratio: Float! = 2, $text: String = "given", $factor: Factor, $factors: [Factor!]) {
  told(tree: $tree, trees: $trees, point: $point, choice: $choice, colour: $colour, money: $money,
    ids: $ids, matrix: $matrix, flag: $flag, ratio: $ratio, text: $text,
    factor: $factor, factors: $factors) }"""


@pytest.mark.cases(20)
@pytest.mark.parametrize(
    ("variables", "stays"),
    [
        ({}, True),
        ({"tree": {"value": "a", "children": [{"value": "b", "at": {"y": 1}}]}}, True),
        ({"tree": {"value": "a", "children": {"value": "b", "children": []}}}, True),
        ({"trees": {"value": "a", "at": None}}, True),
        ({"trees": [{"value": "a", "colour": "VERT"}]}, True),
        ({"trees": [None]}, False),
        ({"tree": {"value": 1}}, False),
        ({"tree": {"value": "a", "unknown": 1}}, False),
        ({"tree": {}}, False),
        ({"point": {}}, True),
        ({"point": {"x": 2.0, "y": 3, "tags": "one"}}, True),
        ({"point": {"x": 2.5}}, False),
        ({"point": {"x": True}}, False),
        ({"point": {"x": None}}, False),
        ({"point": {"x": 2**31}}, False),
        ({"point": {"y": float("inf")}}, False),
        ({"point": {"tags": [None]}}, False),
        ({"point": []}, False),
        ({"choice": {"number": 1}}, True),
        ({"choice": {"points": {"x": 3}}}, True),
        ({"choice": {"number": None}}, False),
        ({"choice": {"number": 1, "points": []}}, False),
        ({"choice": {}}, False),
        ({"colour": "BLUE"}, False),
        ({"colour": "green"}, False),
        ({"colour": None}, False),
        ({"colour": 7}, False),
        ({"money": "5EUR"}, True),
        ({"money": "5USD"}, False),
        ({"ids": ["a", 7]}, True),
        ({"ids": 7}, True),
        ({"ids": [True]}, False),
        ({"ids": [1.5]}, False),
        ({"matrix": [[1, None], []]}, True),
        ({"matrix": [1, [2]]}, True),
        ({"matrix": 3}, True),
        ({"matrix": [None]}, False),
        ({"flag": None, "text": None}, True),
        ({"flag": 1}, False),
        ({"flag": "true"}, False),
        ({"ratio": None}, False),
        ({"ratio": 10**400}, False),
        ({"text": 1}, False),
        ({"factor": {"by": 3}}, True),
        ({"factor": {"most": 4, "least": 1, "unitName": "m", "by": 3}}, True),
        ({"factor": {"by": 3, "unitName": None}, "factors": None}, True),
        ({"factors": [{"by": 1}, {"most": None, "by": 2}], "factor": None}, True),
        ({"factors": {"by": 1}}, True),
        ({"factors": [{"least": 1}]}, False),
        ({"unknown": 1}, True),
    ],
)
async def test_variables_are_coerced_as_by_graphql_core(
    variables: dict[str, Any], stays: bool
) -> None:
    assert await same(TOLD, **variables) is stays


@strawberry.input
class UsualFactor:
    by: int
    unit_name: str | None = strawberry.UNSET
    least: int = 2
    most: int | None


@strawberry.input
class UsualFactors:
    factor: UsualFactor
    others: list[UsualFactor] | None = None
    colour: Colour | None


@built_directly
@strawberry.input
class Factors:
    factor: Factor
    others: list[Factor] | None = None
    colour: Colour | None


@pytest.mark.parametrize(
    "sent",
    [
        {"factor": {"by": 1}},
        {"factor": {"most": 4, "least": 1, "unitName": "m", "by": 3}, "colour": "VERT"},
        {"factor": {"by": 1, "unitName": None, "most": None}, "others": [], "colour": None},
        {"factor": {"by": 1}, "others": [{"by": 2}, {"least": 9, "by": 3, "unitName": ""}]},
        {"factor": {"by": 1}, "others": None},
    ],
)
def test_inputs_that_are_built_directly_are_those_of_strawberry(sent: dict[str, Any]) -> None:
    @strawberry.type
    class Query:
        @strawberry.field
        def built(self, ours: Factors, theirs: UsualFactors) -> list[str]:
            assert isinstance(ours.factor, Factor)
            return [repr(asdict(ours)), repr(asdict(theirs))]

    text = "query ($ours: Factors!, $theirs: UsualFactors!) { built(ours: $ours, theirs: $theirs) }"
    result = strawberry.Schema(query=Query).execute_sync(text, {"ours": sent, "theirs": sent})
    assert result.errors is None
    assert result.data is not None
    assert result.data["built"][0] == result.data["built"][1]


async def test_a_recursive_input_that_is_nested_too_deep_is_refused_as_by_graphql_core() -> None:
    tree: dict[str, Any] = {"value": "leaf"}
    for _ in range(300):
        tree = {"value": "a", "children": [tree]}
    assert not await same(TOLD, tree=tree)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "(flag: null, text: null, ids: 7, matrix: [[1], 2, null])".replace(", null]", "]"),
        '(tree: {value: "a", children: {value: "b"}}, point: {}, choice: {number: 4})',
        "(point: {x: $x, tags: [$text]}, ratio: 3)",
        "(point: {x: 1, y: $ratio}, trees: [{value: $text}])",
        '(money: "8EUR", moneyByDefault: "9EUR", colour: VERT)',
        "(ids: [$id], matrix: [[$x]])",
    ],
)
async def test_literals_are_coerced_as_by_graphql_core(arguments: str) -> None:
    declared = {"$x": "Int! = 3", "$text": 'String! = "t"', "$ratio": "Float", "$id": "ID! = 5"}
    used = [f"{name}: {kind}" for name, kind in declared.items() if name in arguments]
    head = f"query ({', '.join(used)})" if used else "query"
    text = f"{head} {{ told{arguments} again: told{arguments} }}"
    assert await same(text)
    if used:
        await same(text, x=9, text="s", ratio=4, id=True)


CONDITIONS = """query ($a: Boolean!, $b: Boolean = true, $c: Boolean! = false) {
  direct { name @skip(if: $a) part @include(if: $b) { number name @skip(if: true) }
    ...F @include(if: $c) ... @skip(if: $b) { ratio part { name } } } }
fragment F on Whole { grid part { sure @include(if: $a) tenfold } }"""


@pytest.mark.parametrize("a", [True, False])
@pytest.mark.parametrize("b", [True, False, None])
@pytest.mark.parametrize("c", [True, False])
async def test_fields_are_skipped_and_included(a: bool, b: bool | None, c: bool) -> None:
    assert await same(CONDITIONS, a=a, b=b, c=c) is (b is not None)
    await same(CONDITIONS, a=a, c=c)
    assert not await same(CONDITIONS, a=None)
    assert not await same(CONDITIONS)


@pytest.mark.parametrize(
    "text",
    ["{ __schema { queryType { name } } }", '{ direct { name } __type(name: "Part") { name } }'],
)
def test_introspection_is_not_compiled(text: str) -> None:
    assert compiled(text) is None


def test_a_selection_with_too_many_fields_is_not_compiled() -> None:
    many = " ".join(f"a{number}: name" for number in range(1_001))
    assert compiled(f"{{ direct {{ {many} }} }}") is None
    nested = "things { ... on Named { name } } "
    assert compiled("{ direct { " + nested * 3 + "} }") is not None


async def test_more_combinations_of_conditions_than_are_kept_are_left_to_graphql_core() -> None:
    names = "abcde"
    text = f"query ({', '.join(f'${name}: Boolean!' for name in names)}) {{ direct {{ name "
    text += " ".join(f"{name}: ratio @skip(if: ${name})" for name in names) + " } }"
    operation = compiled(text)
    assert operation is not None
    reasons = []
    for number in range(2**5):
        sent = {name: bool(number >> at & 1) for at, name in enumerate(names)}
        result, reason = await operation.verify(Context(), sent)
        assert result.errors is None
        reasons.append(reason)
    assert reasons.count(None) == 8
    assert operation.fields <= 8 * 7


async def test_a_cancelled_execution_ends_its_resolvers_and_is_not_repeated() -> None:
    operation = compiled("{ a: whole { later(wait: 1000) { name } } b: whole { surely { name } } }")
    assert operation is not None
    context = Context()
    task = asyncio.create_task(operation.execute(context, {}))
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {"whole at a", "whole at b"} <= context.called.keys()
    assert "later at a later" not in context.called
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_no_coroutine_is_left_unawaited() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for fault in ("raise", "odd"):
            for name in ("direct", "sure", "later"):
                operation = compiled(EVERYTHING)
                assert operation is not None
                await operation.execute(Context({name: fault}), {})
        await background_work()
        gc.collect()
    assert [str(each.message) for each in found] == []


VALUES: dict[str, list[Any]] = {
    "Int": [0, 1, 7, -3],
    "Float": [0.5, 2, -1.25],
    "String": ["", "text", "ä"],
    "ID": ["a", "7"],
    "Boolean": [True, False],
    "Money": ["5EUR", "0EUR"],
}
FAULTS = [
    *("whole", "direct", "thing", "later", "surely", "tenfold", "sure", "times", "told"),
    *("within times", "within checked", "within price", "add 1", "put 7"),
    *("check weight", "weight", "check guarded", "guarded"),
]


def drawn(seed: int) -> tuple[RandomOperation, dict[str, str]]:
    """An operation that the schema allows, and faults of its resolvers."""
    random = Random(seed)
    root = SCHEMA.get_root_type(random.choice([OperationType.QUERY, OperationType.MUTATION]))
    assert root is not None
    while True:
        operation = RandomOperation(SCHEMA, root, random, VALUES)
        if not validate(SCHEMA, parse(operation.text), RULES):
            break
    count = random.choice([0, 0, 1, 2])
    kinds = ["raise", "null", "odd", "error"]
    return operation, {name: random.choice(kinds) for name in random.sample(FAULTS, count)}


async def check_drawn(seed: int) -> None:
    operation, faults = drawn(seed)
    await same(operation.text, faults, **operation.variables)


def check_all(seeds: Iterable[int]) -> None:
    async def check() -> None:
        for seed in seeds:
            await check_drawn(seed)

    asyncio.run(check())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_random_operations_are_answered_as_by_graphql_core(seed: int) -> None:
    check_all([seed])


@pytest.mark.slow
@settings(max_examples=3_000, deadline=None)
@given(st.integers(0, 2**32))
def test_many_random_operations_are_answered_as_by_graphql_core(seed: int) -> None:
    check_all([seed])


def test_random_operations_use_every_field() -> None:
    kinds = [SCHEMA.type_map[kind.__name__] for kind in (Part, Other, Whole, Query, Mutation)]
    missing = {
        name for kind in kinds if isinstance(kind, GraphQLObjectType) for name in kind.fields
    }
    for seed in range(200):
        text = drawn(seed)[0].text
        missing = {name for name in missing if name not in text}
        if not missing:
            break
    assert missing == set()
