"""Compiled operations: trees of closures that handle only expected values.

A `Compiler` is for one schema, and compiles valid operations that are executed often. Variables,
arguments and results are checked by their exact classes. Anything unexpected, such as a null in a
non-null field, another class, an error of a resolver or an invalid variable, ends the compiled
execution: graphql-core then executes the operation, and its `middleware` returns what the resolvers
have already returned or raised. So no resolver runs twice, and the rules about errors, nulls and
paths stay in graphql-core.

Nothing here depends on jobs, and only `resuming`, `strawberry_classes` and `strawberry_inputs`
depend on Strawberry.
"""

from job_registry_api.graphql.compiled.operation import (
    CompiledOperation,
    Compiler,
    Different,
)
from job_registry_api.graphql.compiled.resuming import Resumable
from job_registry_api.graphql.compiled.strawberry_classes import StrawberryClasses
from job_registry_api.graphql.compiled.strawberry_inputs import built_directly

__all__ = [
    "CompiledOperation",
    "Compiler",
    "Different",
    "Resumable",
    "StrawberryClasses",
    "built_directly",
]
