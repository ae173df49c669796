"""Compiled operations: trees of closures that hold only the way of success.

A `Compiler` is for one schema, and compiles valid operations that are executed often. Variables,
arguments and results are checked by their exact classes. Whatever else comes, such as a null in a
non-null, an unexpected class, a resolver's error or a bad variable, leaves the compiled way:
graphql-core then executes the operation, and its `middleware` hands out what the resolvers have
already returned or raised. So no resolver runs twice, and the rules about errors, nulls and paths
stay in graphql-core.

Nothing here knows jobs, and only `strawberry_classes` knows Strawberry.
"""

from job_registry_api.graphql.compiled.operation import (
    CompiledOperation,
    Compiler,
    Different,
)
from job_registry_api.graphql.compiled.strawberry_classes import StrawberryClasses

__all__ = ["CompiledOperation", "Compiler", "Different", "StrawberryClasses"]
