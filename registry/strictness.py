"""Finds the parts of a payload model that would take JSON which a payload refuses, or lose it.

A class inside a payload has rules of its own. The core schema says which rules hold where, for
every kind of class, alias and annotation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, RootModel, TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass

from job_registry.embedding import embedded
from job_registry.payload import Payload
from job_registry.wire_text import is_secret, reads_as_its_schema_says, with_wire_text

# What these take from JSON depends on strictness. All other kinds take the same either way.
_DEPEND: Final = (
    "bool",
    "int",
    "float",
    "complex",
    "date",
    "time",
    "datetime",
    "timedelta",
    "enum",
    "lax-or-strict",
)
_EXTRA: Final = {"ignore": "drops unknown fields", "allow": "takes unknown fields"}
_OWN_RULES: Final = "reads times, decimals, UUIDs, addresses or enums by rules of its own"
_HIDES_SECRETS: Final = "would be stored without its secrets"
_STRICT: Final = "ConfigDict(strict=True, extra='forbid')"


def lax_parts(model: type[Payload]) -> list[str]:
    """Return a sentence for each part that is less strict than a payload, with what to do."""
    finder = _Finder()
    finder.visit(TypeAdapter(model).core_schema, "", {}, _Owner(model, ""))
    return finder.sentences()


class _Owner(NamedTuple):
    """The class whose configuration holds, and where it is."""

    cls: type
    path: str


class _Finder:
    """Walks a core schema. What a class allows is collected by class, where it can be changed."""

    def __init__(self) -> None:
        self._definitions: dict[str, Any] = {}
        self._visited: set[tuple[str, bool, bool]] = set()
        self._classes: dict[type, tuple[str, list[str]]] = {}
        self._parts: list[str] = []

    def sentences(self) -> list[str]:
        classes = [
            f"{path} is {cls.__name__}, which {' and '.join(reasons)}: {_mend(cls, reasons)}"
            for cls, (path, reasons) in self._classes.items()
        ]
        return classes + self._parts

    def visit(
        self,
        schema: Any,
        path: str,
        config: Mapping[str, Any],
        owner: _Owner,
        *,
        is_converted: bool = False,
    ) -> None:
        """Collect what is lax in a schema. `config` is the one that holds here.

        `is_converted` if a validator of the user's own, which runs first, may replace the JSON.
        """
        kind = schema["type"]
        if kind == "definitions":
            self._definitions |= {each["ref"]: each for each in schema["definitions"]}
        if kind == "definition-ref":
            defined = self._definitions[schema["schema_ref"]]
            seen = (schema["schema_ref"], bool(config.get("strict")), is_converted)
            if seen not in self._visited:
                self._visited.add(seen)
                self.visit(defined, path, config, owner, is_converted=is_converted)
            return
        if kind in ("model", "dataclass", "typed-dict"):
            # Pydantic uses the configuration of the class itself, and none from outside.
            config, owner = schema.get("config") or {}, _Owner(schema["cls"], path)
        if kind in ("model-fields", "typed-dict", "dataclass-args"):
            extra = schema.get("extra_behavior") or config.get("extra_fields_behavior", "ignore")
            if extra != "forbid":
                self._add(owner, _EXTRA[extra])
        is_converted = is_converted or _may_convert(schema)
        faults = [*_faults_of_part(schema, config)]
        if not is_converted:
            faults += _unlike_json(schema)
        self._parts += (f"{path}{fault}" for fault in faults)
        for name, field in _fields(schema):
            if field.get("serialization_exclude"):
                at = f"{path}.{name}".lstrip(".")
                self._parts.append(f"{at} would not be stored: remove exclude=True")
        if reads_as_its_schema_says(schema) and _validates_itself(owner.cls):
            self._add(owner, _OWN_RULES)
        if is_secret(schema) and _validates_itself(owner.cls):
            self._add(owner, _HIDES_SECRETS)
        strict = schema.get("strict", config.get("strict", False))
        if not strict and _depends(schema, config):
            if schema.get("strict") is False:
                self._parts.append(f"{path} is not strict: remove strict=False")
            else:
                self._add(owner, "is not strict")
        else:
            for step, below in _below(schema):
                where = f"{path}{step}".lstrip(".")
                self.visit(below, where, config, owner, is_converted=is_converted)

    def _add(self, owner: _Owner, reason: str) -> None:
        _, reasons = self._classes.setdefault(owner.cls, (owner.path, []))
        if reason not in reasons:
            reasons.append(reason)


def _validates_itself(cls: type) -> bool:
    """Return whether Pydantic validates instances by what the class has compiled for itself, and
    not as a part of the payload."""
    return is_pydantic_dataclass(cls) or (
        issubclass(cls, BaseModel) and not issubclass(cls, Payload)
    )


def _faults_of_part(schema: Any, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with one part, whatever class it is in, to be read after its path."""
    match schema["type"]:
        case "generator":
            yield " is read only when it is iterated: use a list, a tuple or a Sequence"
        case "bytes":
            written, read = (config.get(f"{way}_json_bytes", "utf8") for way in ("ser", "val"))
            if written != read:
                yield (
                    " is stored in another way than it is read: give ser_json_bytes and"
                    " val_json_bytes the same value"
                )


def _may_convert(schema: Any) -> bool:
    """Return whether this is a validator of the user's own that runs before Pydantic's."""
    if schema["type"] not in ("function-before", "function-wrap"):
        return False
    ours = (with_wire_text.__module__, embedded.__module__)
    return getattr(schema["function"]["function"], "__module__", "") not in ours


def _takes_other_values(cls: type[Enum]) -> bool:
    """Return whether an enum may take values that none of its members has."""
    return any("_missing_" in vars(each) for each in cls.mro() if each is not Enum)


def _unlike_json(schema: Any) -> Iterator[str]:
    """Yield a fault if one of the values to choose from is not equal to any JSON."""
    members: Iterable[tuple[object, object]] = ()
    if schema["type"] == "literal":
        members = ((each, each) for each in schema["expected"])
    elif schema["type"] == "enum" and not _takes_other_values(schema["cls"]):
        members = ((each, each.value) for each in schema["members"])
    for member, value in members:
        if not isinstance(value, str | int | float | list | dict | None):
            shown = member if isinstance(member, Enum) else repr(member)
            yield (
                f" takes {shown}, to which no JSON is equal: use strings or numbers, such as those"
                " of a StrEnum"
            )
            return


def _depends(schema: Any, config: Mapping[str, Any]) -> bool:
    """Return whether a value without further parts takes other JSON where it is not strict."""
    if schema["type"] == "str":
        return bool(schema.get("coerce_numbers_to_str", config.get("coerce_numbers_to_str")))
    return schema["type"] in _DEPEND


def _below(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a schema that JSON is read with, and the path to each.

    The keys of an object are left out: they are strings in any JSON.
    """
    match schema["type"]:
        case "model-fields" | "typed-dict" | "dataclass-args" | "named-tuple":
            for name, field in _fields(schema):
                yield f".{name}", field["schema"]
        case "arguments" | "arguments-v3":
            for field in schema["arguments_schema"]:
                yield f".{field['name']}", field["schema"]
        case "call":
            yield "", schema["arguments_schema"]
        case "union":
            for choice in schema["choices"]:
                yield "", choice[0] if isinstance(choice, tuple) else choice
        case "tagged-union":
            for choice in schema["choices"].values():
                yield "", choice
        case "tuple":
            for index, item in enumerate(schema["items_schema"]):
                yield f"[{index}]", item
        case "lax-or-strict":
            yield "", schema["strict_schema"]
        case "json-or-python":
            yield "", schema["json_schema"]
        case "chain":
            yield "", schema["steps"][0]
        case _:
            for key in ("items_schema", "values_schema"):
                if key in schema:
                    yield "[]", schema[key]
            if "schema" in schema:
                yield "", schema["schema"]


def _fields(schema: Any) -> Iterable[tuple[str, Any]]:
    """Return the fields of a class with their names."""
    if schema["type"] in ("model-fields", "typed-dict"):
        return list(schema["fields"].items())
    if schema["type"] in ("dataclass-args", "named-tuple"):
        return [(field["name"], field) for field in schema["fields"]]
    return ()


def _mend(cls: type, reasons: Sequence[str]) -> str:
    """Return how to make a class as strict as a payload."""
    name = cls.__name__
    if _OWN_RULES in reasons or _HIDES_SECRETS in reasons:
        return (
            f"use what is in {name} itself"
            if issubclass(cls, RootModel)
            else f"derive {name} from Payload"
        )
    if issubclass(cls, Payload):
        return f"leave strict and extra out of the model_config of {name}"
    if issubclass(cls, RootModel):
        return "set model_config = ConfigDict(strict=True)"
    if issubclass(cls, BaseModel):
        return f"derive {name} from Payload, or set model_config = {_STRICT}"
    if is_pydantic_dataclass(cls):
        return f"derive {name} from Payload, or decorate it with @dataclass(config={_STRICT})"
    return f"derive {name} from Payload, or set __pydantic_config__ = {_STRICT}"
