"""Compiles an operation and executes it. Executions with unexpected values go to graphql-core."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import CORO_CREATED, getcoroutinestate, isawaitable, iscoroutine
from types import CoroutineType
from typing import Any, Final, TypeGuard

from graphql import (
    BooleanValueNode,
    DocumentNode,
    ExecutionResult,
    FieldNode,
    FragmentDefinitionNode,
    GraphQLObjectType,
    GraphQLResolveInfo,
    GraphQLSchema,
    InlineFragmentNode,
    OperationDefinitionNode,
    OperationType,
    SelectionNode,
    SelectionSetNode,
    VariableNode,
    VariableValues,
    execute,
)

from job_registry_api.graphql.compiled.inputs import InputCompiler, Variables
from job_registry_api.graphql.compiled.leaving import NotCompiled, Odd
from job_registry_api.graphql.compiled.outputs import Branch, Call, Classes, OutputCompiler, Step
from job_registry_api.graphql.compiled.resuming import resuming

MAX_FIELDS: Final = 1_000
"""The most fields of one operation, counted once per object type of a union or interface."""

MAX_VARIANTS: Final = 8
"""The most combinations of the variables of `@skip` and `@include` that are compiled."""

_INCLUSION: Final = ("skip", "include")


class Different(AssertionError):
    """Raised by `CompiledOperation.verify`: graphql-core executes the operation differently."""


class Compiler:
    """Compiles operations of one schema."""

    def __init__(self, schema: GraphQLSchema, classes: Classes) -> None:
        self.schema = schema
        self.classes = classes
        self._inputs = InputCompiler(schema)

    def compile(
        self,
        document: DocumentNode,
        operation: OperationDefinitionNode,
        grown: Callable[[int], None] = lambda fields: None,
    ) -> CompiledOperation | None:
        """Compile an operation of a valid document; return None if only graphql-core executes it.

        Only graphql-core executes subscriptions, introspection, directives other than `@skip` and
        `@include`, very large selections, and objects whose Python class does not determine their
        type.

        `grown` is called with the number of fields that were compiled, from which their memory can
        be estimated: now, or when the values of `@skip` and `@include` are known.
        """
        root = self.schema.get_root_type(operation.operation)
        if root is None or operation.operation is OperationType.SUBSCRIPTION:
            return None
        try:
            variables = self._inputs.variables(operation)
            compiled = CompiledOperation(self, document, operation, root, variables, grown)
            compiled.prepare()
        except NotCompiled:
            return None
        return compiled


class CompiledOperation:
    """An operation that is executed by closures, and by graphql-core if a value is unexpected."""

    def __init__(
        self,
        compiler: Compiler,
        document: DocumentNode,
        operation: OperationDefinitionNode,
        root: GraphQLObjectType,
        variables: Variables,
        grown: Callable[[int], None],
    ) -> None:
        self._compiler = compiler
        self._grown = grown
        self._document = document
        self._operation = operation
        self._root = root
        self._variables = variables
        self._is_serial = operation.operation is OperationType.MUTATION
        self._fragments = {
            node.name.value: node
            for node in document.definitions
            if isinstance(node, FragmentDefinitionNode)
        }
        self._conditions = _conditions(operation, self._fragments)
        self._variants: dict[tuple[bool, ...], list[Step] | None] = {}
        self.fields = 0
        """How many fields have been compiled."""

    def prepare(self) -> None:
        """Compile the only variant, if there is only one.

        Raises:
            NotCompiled: only graphql-core executes the operation.
        """
        if not self._conditions:
            self._variants[()] = self._compiled({})

    async def execute(
        self,
        context: Any,
        sent: Mapping[str, Any],
        *,
        root_value: Any = None,
        **options: Any,
    ) -> ExecutionResult:
        """Execute the operation with these variables.

        `options` are those of graphql-core's `execute`, if it executes the operation.
        """
        calls: list[Call] = []
        try:
            data = await self._begun(context, sent, root_value, calls)
        except Exception:
            # An error of a resolver is not lost: graphql-core gets what the resolvers have raised.
            return await self._by_graphql_core(context, sent, root_value, calls, options)
        return ExecutionResult(data, None)

    async def verify(
        self,
        context: Any,
        sent: Mapping[str, Any],
        *,
        root_value: Any = None,
        **options: Any,
    ) -> tuple[ExecutionResult, Exception | None]:
        """Execute the operation, and compare the result with that of graphql-core.

        Return the result, and the exception that ended the compiled execution, if any.
        graphql-core gets what the resolvers have returned, so that each runs once.

        Raises:
            Different: the data, the arguments of a resolver or its info are not the same.
        """
        calls: list[Call] = []
        reason: Exception | None = None
        data: dict[str, Any] | None = None
        try:
            data = await self._begun(context, sent, root_value, calls)
        except Exception as error:
            reason = error
        found: list[str] = []
        result = await self._by_graphql_core(
            context, sent, root_value, calls, options, found, is_whole=reason is None
        )
        if reason is None and (result.errors or repr(result.data) != repr(data)):
            found.append(f"compiled: {data!r}, by graphql-core: {result!r}")
        if found:
            raise Different("\n".join(found))
        return result, reason

    def _begun(
        self, context: Any, sent: Mapping[str, Any], root_value: Any, calls: list[Call]
    ) -> Awaitable[dict[str, Any]]:
        """Coerce the variables, and return the awaitable that executes the operation."""
        variables = self._variables(sent)
        steps = self._steps(variables)
        if self._is_serial or len(steps) == 1:
            return _in_order(steps, Branch(context, root_value, variables, calls), {})
        branches = [Branch(context, root_value, variables, calls) for _ in steps]
        return _at_once(steps, branches)

    def _steps(self, variables: VariableValues) -> list[Step]:
        """Return the steps of the root fields for the values of `@skip` and `@include`.

        Raises:
            Odd: a value is not a Boolean, or its combination is not compiled.
        """
        if not self._conditions:
            return self._variants[()] or []
        values = {name: variables.coerced.get(name) for name in self._conditions}
        variant = tuple(value is True for value in values.values())
        if not all(value.__class__ is bool for value in values.values()):
            raise Odd
        if variant not in self._variants and len(self._variants) < MAX_VARIANTS:
            try:
                self._variants[variant] = self._compiled(values)
            except NotCompiled:
                self._variants[variant] = None
        steps = self._variants.get(variant)
        if steps is None:
            raise Odd
        return steps

    def _compiled(self, values: Mapping[str, Any]) -> list[Step]:
        """Compile the fields for these values of `@skip` and `@include`.

        Raises:
            NotCompiled: only graphql-core executes the operation.
        """
        output = OutputCompiler(
            self._compiler.schema,
            self._fragments,
            self._operation,
            self._compiler.classes,
            lambda node: _is_included(node, values),
            MAX_FIELDS - self.fields,
        )
        try:
            steps = output.root(self._root)
        finally:
            self.fields += output.fields
        self._grown(output.fields)
        return steps

    async def _by_graphql_core(
        self,
        context: Any,
        sent: Mapping[str, Any],
        root_value: Any,
        calls: Sequence[Call],
        options: Mapping[str, Any],
        differences: list[str] | None = None,
        *,
        is_whole: bool = False,
    ) -> ExecutionResult:
        """Execute by graphql-core, which gets what the calls have returned or raised.

        Differences between the calls are appended to `differences`. `is_whole` says that the
        compiled execution succeeded, so that graphql-core must not make further calls.
        """
        name = self._operation.name.value if self._operation.name else None
        attribute_of = self._compiler.classes.attribute_of
        known = {_keys(call): call for call in calls}
        left = known.copy()

        def hand_out(
            next_: Callable[..., Any], source: Any, info: GraphQLResolveInfo[Any], **arguments: Any
        ) -> Any:
            path = tuple(info.path.as_list())
            call = known.get(path)
            if call is None:
                if is_whole and not (
                    info.field_name == "__typename"
                    or attribute_of(info.parent_type.name, info.field_name)
                ):
                    assert differences is not None
                    differences.append(f"only by graphql-core: {info.path.as_list()}")
                return next_(source, info, **arguments)
            left.pop(path, None)
            if differences is not None:
                differences.extend(_differences(call, info, arguments))
            if call.converted is not None and _has_not_begun(call.value):
                # The layers make the first call: within `resuming`, it would wait for itself.
                _close(call.value)
                return next_(source, info, **arguments)
            if call.field.is_async:
                layers = partial(next_, source, info, **arguments)
                return _resumed_later(call, layers, differences)
            if call.converted is not None:
                with _resumed(call, differences):
                    return next_(source, info, **arguments)
            if call.error is not None:
                raise call.error
            return call.value

        try:
            result = execute(
                self._compiler.schema,
                self._document,
                root_value,
                context,
                dict(sent),
                name,
                middleware=[hand_out] if calls or differences is not None else None,
                **options,
            )
            result = await result if isawaitable(result) else result
        finally:
            for call in left.values():
                _close(call.value)
        if is_whole and differences is not None:
            differences += [f"only compiled: {path}" for path in left]
        return result


@contextmanager
def _resumed(call: Call, differences: list[str] | None) -> Iterator[None]:
    """Let the layers that handle errors use the outcome of a direct call, and compare it."""
    with resuming(call) as resumed:
        try:
            yield
        finally:
            if differences is not None and repr(call.converted) != repr(resumed.arguments):
                differences.append(
                    f"{_keys(call)}: {call.converted!r}, by the layers {resumed.arguments!r}"
                )


async def _resumed_later(
    call: Call, layers: Callable[[], Awaitable[Any]], differences: list[str] | None
) -> Any:
    with _resumed(call, differences):
        return await layers()


async def _at_once(steps: Sequence[Step], branches: Sequence[Branch]) -> dict[str, Any]:
    """Execute the root fields of a query together, until each has ended."""
    data: dict[str, Any] = {}
    fields = (_in_order([step], branch, data) for step, branch in zip(steps, branches, strict=True))
    # Wait for all, even if one fails: graphql-core needs what the resolvers returned.
    ends = await asyncio.gather(*fields, return_exceptions=True)
    failed = [end for end in ends if isinstance(end, BaseException)]
    for end in sorted(failed, key=lambda end: isinstance(end, Exception)):
        raise end
    return data


async def _in_order(steps: Sequence[Step], branch: Branch, data: dict[str, Any]) -> dict[str, Any]:
    """Execute root fields, each with all that is below it, and return the data.

    What the resolvers of a level have returned is awaited together, and then completed.

    Raises:
        Odd: a value is unexpected.
        Exception: the error of a resolver.
    """
    for step in steps:
        step(branch.root_value, branch, None, data)
        while branch.waiting:
            waiting, branch.waiting = branch.waiting, []
            if len(waiting) == 1:
                call = waiting[0]
                try:
                    call.value = await call.value
                except Exception as error:
                    await _answer_error(call, error)
            else:
                await _settle(waiting)
            for call in waiting:
                if call.error is not None:
                    raise call.error
                key, complete, *_ = call.field
                call.answer[key] = complete(call.value, branch, call.info.path)
    return data


async def _settle(calls: list[Call]) -> None:
    """Await the results of resolvers together, until each has returned or raised."""
    outcomes = await asyncio.gather(*(call.value for call in calls), return_exceptions=True)
    for call, outcome in zip(calls, outcomes, strict=True):
        if not isinstance(outcome, BaseException):
            call.value = outcome
        elif isinstance(outcome, Exception):
            await _answer_error(call, outcome)
        else:
            raise outcome


async def _answer_error(call: Call, error: Exception) -> None:
    """Let the layers that a direct call left out answer its error, with data or another error."""
    call.value, call.error = None, error
    if call.converted is None:
        return
    try:
        with resuming(call):
            value = await call.field.layers(call.source, call.info, **call.arguments)
    except Exception as another:
        call.error = another
    else:
        call.value, call.error = value, None


def _conditions(
    operation: OperationDefinitionNode, fragments: Mapping[str, FragmentDefinitionNode]
) -> tuple[str, ...]:
    """Return the names of the variables in `@skip` and `@include`.

    Raises:
        NotCompiled: the document has other directives.
    """
    names: set[str] = set()
    definitions = (operation, *fragments.values())
    variables = operation.variable_definitions or ()
    if any(each.directives for each in definitions) or any(each.directives for each in variables):
        raise NotCompiled("a directive")
    waiting: list[SelectionSetNode] = [each.selection_set for each in definitions]
    while waiting:
        for node in waiting.pop().selections:
            for directive in node.directives or ():
                if directive.name.value not in _INCLUSION:
                    raise NotCompiled("a directive")
                for argument in directive.arguments or ():
                    if isinstance(argument.value, VariableNode):
                        names.add(argument.value.name.value)
                    elif not isinstance(argument.value, BooleanValueNode):
                        raise NotCompiled("a directive")
            match node:
                case FieldNode(selection_set=SelectionSetNode() as inner):
                    waiting.append(inner)
                case InlineFragmentNode(selection_set=inner):
                    waiting.append(inner)
    return tuple(sorted(names))


def _is_included(node: SelectionNode, values: Mapping[str, Any]) -> bool:
    for directive in node.directives or ():
        (argument,) = directive.arguments or ()
        value = argument.value
        if isinstance(value, VariableNode):
            is_set = values[value.name.value]
        else:
            assert isinstance(value, BooleanValueNode)
            is_set = value.value
        if is_set is (directive.name.value == "skip"):
            return False
    return True


def _keys(call: Call) -> tuple[str | int, ...]:
    return tuple(call.info.path.as_list())


def _close(value: object) -> None:
    """Close a coroutine that nobody will await."""
    if _has_not_begun(value):
        value.close()


def _has_not_begun(value: object) -> TypeGuard[CoroutineType[Any, Any, Any]]:
    return iscoroutine(value) and getcoroutinestate(value) == CORO_CREATED


def _differences(
    call: Call, info: GraphQLResolveInfo[Any], arguments: Mapping[str, Any]
) -> list[str]:
    """Return the differences between a compiled call and the call by graphql-core."""
    found = []
    if repr(call.arguments) != repr(arguments):
        found.append(f"{_keys(call)}: {call.arguments!r}, by graphql-core {arguments!r}")
    ours = call.info._asdict()
    for name, theirs in info._asdict().items():
        mine = ours[name]
        match name:
            case "field_nodes":
                same = [*map(id, mine)] == [*map(id, theirs)]
            case "path" | "fragments":
                same = mine == theirs
            case "variable_values":
                same = _described(mine) == _described(theirs)
            case "async_helpers":
                same = True
            case _:
                same = mine is theirs or mine == theirs
        if not same:
            found.append(f"{_keys(call)}: the info's {name} is {mine!r}, not {theirs!r}")
    return found


def _described(variables: VariableValues) -> str:
    """Return the text of variables without the addresses of objects."""
    sources = [
        (name, repr(source.value), str(source.signature.type), source.signature.default)
        for name, source in variables.sources.items()
    ]
    defaults = [(*each, default and default.literal) for *each, default in sources]
    return repr((defaults, variables.coerced))
