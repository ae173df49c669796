"""Find job types in the modules that settings name, and in installed packages.

A package joins by the entry-point group `job_registry.catalog`, whose entries name a module, a
`JobType`, or a list of them.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from job_registry.errors import DefinitionError, shortened
from job_registry.extension import WorkerExtension
from job_registry.job_type import JobType
from job_registry.registry import DEFAULT_MAX_PAYLOAD_BYTES, JobRegistry

ENTRY_POINT_GROUP: Final = "job_registry.catalog"


def load_registry(
    catalog: Sequence[str], *, max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES
) -> JobRegistry:
    """Return the registry of all job types and extensions in `catalog` and the entry points.

    Raises:
        DefinitionError: as `discover`.
    """
    return JobRegistry(
        discover(catalog),
        max_payload_bytes=max_payload_bytes,
        extensions=discover_extensions(catalog),
    )


def discover(catalog: Sequence[str], *, entry_points: bool = True) -> list[JobType[Any]]:
    """Return the job types in modules, in all modules of packages, and in entry points.

    They stand at the top level of a module. The same `JobType` seen twice counts once. Modules of
    a package whose names start with `_` are not searched: handlers may keep heavy imports there.
    Nor are its folders without `__init__.py`: they may hold scripts, such as migrations.

    Raises:
        DefinitionError: a module cannot be imported, defines a job type wrongly, or holds none;
            or two different job types share a name. It names the module.
    """
    found: dict[str, tuple[JobType[Any], str]] = {}
    sources = [(name, _in_module(name)) for name in catalog]
    if entry_points:
        for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
            sources.append((f"entry point {entry.name} = {entry.value}", _in_entry_point(entry)))
    for source, job_types in sources:
        for job_type in job_types:
            known, where = found.setdefault(job_type.name, (job_type, source))
            if known is not job_type:
                raise DefinitionError(
                    f"{source}: the job type {job_type.name} is defined already, in {where}"
                )
    return [job_type for job_type, _ in found.values()]


def discover_extensions(
    catalog: Sequence[str], *, entry_points: bool = True
) -> list[WorkerExtension]:
    """Return the worker extensions in modules, in all modules of packages, and in entry points.

    They stand at the top level of a module. One seen twice counts once.

    Raises:
        DefinitionError: a module cannot be imported.
    """
    names = list(catalog)
    if entry_points:
        names += [entry.module for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)]
    found = {
        id(value): value
        for name in names
        for module in _modules(name)
        for value in vars(module).values()
        if isinstance(value, WorkerExtension)
    }
    return list(found.values())


def locate(thing: JobType[Any] | WorkerExtension, *hints: str | None) -> str | None:
    """Return where another process can import this from: `module:name`, or None.

    The modules `hints` come first, then every other imported module. A job type may also be an
    item of a list at the top level of a module.
    """
    for name in (*hints, *list(sys.modules)):
        module = sys.modules.get(name or "")
        # `__main__` is another module in every process.
        if name is None or module is None or name in ("__main__", "__mp_main__"):
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is thing or (
                type(value) in (list, tuple) and any(item is thing for item in value)
            ):
                return f"{name}:{attribute}"
    return None


def import_from(address: str) -> Any:
    """Return what is at an address, `module:name`, that `locate` returned.

    Raises:
        DefinitionError: the module cannot be imported, or has nothing of this name.
    """
    module, _, attribute = address.partition(":")
    try:
        return getattr(_import(module), attribute)
    except AttributeError:
        raise DefinitionError(f"{module}: there is no {attribute} in this module") from None


def _modules(name: str) -> Iterator[ModuleType]:
    """Yield a module, and all modules of a package, except those whose names start with `_`."""
    module = _import(name)
    yield module
    # Not `walk_packages`: it imports every package in the package, also one to leave out.
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not info.name.startswith("_"):
            yield from _modules(f"{name}.{info.name}")


def _in_module(name: str) -> list[JobType[Any]]:
    job_types = [job_type for each in _modules(name) for job_type in _of(each)]
    if not job_types:
        raise DefinitionError(f"{name}: no JobType is defined {_place_of(sys.modules[name])}")
    return job_types


def _place_of(module: ModuleType) -> str:
    """Return where job types were searched. Another module of the same name may come first."""
    if hasattr(module, "__path__"):
        folders = ", ".join(module.__path__)
        return (
            f"at the top level of the modules of this package, {folders}; folders in it without"
            " __init__.py are not searched"
        )
    return f"at the top level of this module, {getattr(module, '__file__', None) or 'built-in'}"


def _in_entry_point(entry: metadata.EntryPoint) -> list[JobType[Any]]:
    where = f"entry point {entry.name} = {entry.value}"
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:
        raise DefinitionError(f"{where}: {_reason(error)}") from error
    if isinstance(loaded, ModuleType):
        return _in_module(loaded.__name__)
    if isinstance(loaded, JobType):
        return [loaded]
    if isinstance(loaded, Iterable) and not isinstance(loaded, str | bytes):
        job_types = list(loaded)
        if job_types and all(isinstance(each, JobType) for each in job_types):
            return job_types
    raise DefinitionError(
        f"{where}: expected a module, a JobType or a list of them, got {shortened(loaded)}"
    )


def _of(module: ModuleType) -> list[JobType[Any]]:
    return [value for value in vars(module).values() if isinstance(value, JobType)]


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise DefinitionError(f"{name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return why a module could not be imported, and the line of it: `… (myjobs.py, line 8)`."""
    match error:
        case SyntaxError():  # It says where.
            return f"{type(error).__name__}: {error}"
        case DefinitionError():
            reason = str(error)
        case ModuleNotFoundError() if not _lines_of(error):  # The catalog names it.
            if error.name is not None and error.name.endswith(".py"):
                return f"{error}. Name the module: {error.name.removesuffix('.py')}"
            return (
                f"{error}. Python searches {Path(sys.path[0]).absolute()} first, then PYTHONPATH"
                " and the installed packages"
            )
        case SystemExit():
            reason = f"sys.exit({shortened(error.code)}) was called during the import"
        case _:
            reason = f"{type(error).__name__}: {error}"
    return reason + "".join(_lines_of(error)[-1:])


def _lines_of(error: BaseException) -> list[str]:
    return [
        f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
