"""Random payload models, small edits of them, and random JSON that mostly fits them.

A model is described by plain tuples, its spec, so that an edited copy is easily made.
"""

from __future__ import annotations

import datetime
import enum
import json
from decimal import Decimal
from random import Random
from typing import Annotated, Any, ForwardRef, Literal, Union
from uuid import UUID

from pydantic import (
    UUID4,
    AnyUrl,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    create_model,
)
from pydantic_core import SchemaError

from job_registry import DefinitionError, JobType, Payload

Spec = tuple[Any, ...]
Fields = dict[str, tuple[Spec, bool]]
"""The spec of each field, and whether it is required."""

NAMES = ("a", "b", "c", "d")
TEXTS = ("", "a", "b", "ab", "abc", "A", "é", "ééé", "0", "1", "12345", " ", "x" * 12, "kind")
NUMBERS: tuple[float, ...] = (-5, -1, 0, 1, 2, 3, 4, 5, 6, 10, 12, 0.5, 1.0, 1.5, 2.0, -0.5, 2.5)
PATTERNS = ("^a", "a$", "^[ab]+$", "^.*$", "[0-9]")
PLAIN: dict[str, tuple[Any, tuple[JsonValue, ...]]] = {
    "bool": (bool, (True, False)),
    "none": (None, (None,)),
    "any": (Any, (None, 1, "a", [1], {"a": 1})),
    "date": (datetime.date, ("2030-01-31", "1999-12-31")),
    "datetime": (datetime.datetime, ("2030-01-31T12:00:00Z", "2030-01-31T00:00:00")),
    "time": (datetime.time, ("12:00:00", "12:00:00Z", "12:00")),
    "timedelta": (datetime.timedelta, ("PT1H", "P1D", "12:00:00")),
    "uuid": (UUID, ("3f2504e0-4f89-11d3-9a0c-0305e82c3301", "3F2504E04F8941D39A0C0305E82C3301")),
    "uuid4": (UUID4, ("3f2504e0-4f89-41d3-9a0c-0305e82c3301",)),
    "url": (AnyUrl, ("http://example.com", "ftp://x/")),
}
CONSTANTS: tuple[JsonValue, ...] = ("a", "b", "ab", "", 0, 1, 2, True, False, None)
KEYS: tuple[Spec, ...] = (
    ("str", ()),
    ("str", (("min_length", 1),)),
    ("str", (("max_length", 1),)),
    ("str", (("pattern", "^a"),)),
    ("literal", ("a", "b")),
    ("literal", ("a",)),
    ("date",),
    ("uuid",),
    ("int", ()),
    ("bool",),
)


def random_fields(random: Random, depth: int = 0, names: tuple[str, ...] = NAMES) -> Fields:
    count = random.randint(1 if depth == 0 else 0, 2 if depth == 0 else 3)
    return {
        name: (random_spec(random, depth), random.random() < 0.5)
        for name in random.sample(names, min(count, len(names)))
    }


def random_spec(random: Random, depth: int = 0) -> Spec:
    simple = [
        *((name,) for name in PLAIN),
        ("self",),
        *(("int", "float", "str", "bytes", "decimal", "literal", "enum") * 2),
    ]
    nested = ["list", "set", "tuple", "many", "dict", "union", "tagged", "model"]
    kind = random.choice(simple if depth > 2 or random.random() < 0.5 else nested)
    if isinstance(kind, tuple):
        return kind
    match kind:
        case "int" | "float" | "str" | "bytes" | "decimal":
            return (kind, random_bounds(random, kind))
        case "literal" | "enum":
            return (kind, random_constants(random, kind))
        case "list" | "set":
            item = hashable(random) if kind == "set" else random_spec(random, depth + 1)
            return (kind, item, random_lengths(random))
        case "many":
            return (kind, random_spec(random, depth + 1))
        case "tuple":
            count = random.randint(0, 3)
            return (kind, tuple(random_spec(random, depth + 1) for _ in range(count)))
        case "dict":
            value = random_spec(random, depth + 1)
            return (kind, random.choice(KEYS), value, random_lengths(random))
        case "union":
            count = random.randint(2, 3)
            return (kind, tuple(random_spec(random, depth + 1) for _ in range(count)))
        case "tagged":
            tags = random.sample(["a", "b", "c", "d"], random.randint(2, 4))
            split = random.randint(1, len(tags) - 1)
            groups = (tuple(tags[:split]), tuple(tags[split:]))
            names = ("a", "b")
            return (
                kind,
                tuple(
                    (group, random.random() < 0.7, random_fields(random, depth + 1, names))
                    for group in groups
                ),
            )
        case _:
            return ("model", random_fields(random, depth + 1))


def hashable(random: Random) -> Spec:
    return random.choice(
        [
            ("int", ()),
            ("float", ()),
            ("str", ()),
            ("uuid",),
            ("date",),
            ("bool",),
            ("literal", (1, 2)),
            ("union", (("int", ()), ("str", ()))),
        ]
    )


def random_constants(random: Random, kind: str) -> tuple[JsonValue, ...]:
    values = [*CONSTANTS, 1.0, 1.5] if kind == "enum" else CONSTANTS
    if random.random() < 0.5:
        values = [value for value in values if isinstance(value, str)]
    chosen: list[JsonValue] = []
    for value in random.sample(values, random.randint(1, 3)):
        if value not in chosen:
            chosen.append(value)
    return tuple(chosen)


def random_bounds(random: Random, kind: str) -> tuple[tuple[str, Any], ...]:
    if random.random() < 0.4:
        return ()
    bounds: dict[str, Any] = {}
    if kind in ("int", "float", "decimal"):
        name = random.choice(["ge", "gt", "le", "lt", "multiple_of", "both"])
        values = range(-2, 8) if kind == "int" else NUMBERS
        if kind == "decimal" and random.random() < 0.4:
            bounds[random.choice(["max_digits", "decimal_places"])] = random.randint(1, 3)
        elif name == "multiple_of":
            bounds[name] = random.choice([1, 2, 3, 4] if kind == "int" else [0.5, 1, 1.5, 2])
        elif name == "both":
            bounds[random.choice(["ge", "gt"])] = random.choice(values)
            bounds[random.choice(["le", "lt"])] = random.choice(values)
        else:
            bounds[name] = random.choice(values)
    else:
        bounds |= dict(random_lengths(random))
        if kind == "str" and random.random() < 0.3:
            bounds["pattern"] = random.choice(PATTERNS)
    return tuple(sorted(bounds.items()))


def random_lengths(random: Random) -> tuple[tuple[str, int], ...]:
    bounds = {}
    if random.random() < 0.3:
        bounds["min_length"] = random.randint(0, 3)
    if random.random() < 0.3:
        bounds["max_length"] = random.randint(0, 4)
    return tuple(sorted(bounds.items()))


def edited_fields(random: Random, fields: Fields, depth: int = 0) -> Fields:
    """Return a copy with one small edit somewhere."""
    edited = dict(fields)
    names = list(edited)
    match random.randint(0, 9):
        case 0:
            free = [name for name in NAMES if name not in edited]
            if free:
                spec = random_spec(random, depth + 1)
                edited[random.choice(free)] = (spec, random.random() < 0.3)
        case 1 if names:
            del edited[random.choice(names)]
        case 2 | 3 if names:
            name = random.choice(names)
            spec, required = edited[name]
            edited[name] = (spec, not required)
        case _ if names:
            name = random.choice(names)
            spec, required = edited[name]
            edited[name] = (edited_spec(random, spec, depth), required)
    return edited


def edited_spec(random: Random, spec: Spec, depth: int) -> Spec:
    if random.random() < 0.15:
        return random_spec(random, depth + 1)
    if random.random() < 0.15:
        other = random.choice([("none",), ("int", ()), ("str", ()), random_spec(random, 3)])
        return ("union", (spec, other))
    kind = spec[0]
    match kind:
        case "int" | "float" | "str" | "bytes" | "decimal":
            swaps = {"int": "float", "float": "int", "str": "bytes", "bytes": "str"}
            if random.random() < 0.3 and not any(name == "pattern" for name, _ in spec[1]):
                return (swaps.get(kind, kind), spec[1])
            if spec[1] and random.random() < 0.7:
                index = random.randrange(len(spec[1]))
                bounds = list(spec[1])
                name, value = bounds[index]
                if name == "pattern" or random.random() < 0.2:
                    del bounds[index]
                else:
                    least = 1 if name in ("multiple_of", "max_digits") else -3
                    least = 0 if name in ("min_length", "max_length", "decimal_places") else least
                    bounds[index] = (name, max(least, value + random.choice([-1, 1, 2])))
                return (kind, tuple(bounds))
            return (kind, random_bounds(random, kind))
        case "literal" | "enum":
            if random.random() < 0.2:
                return random.choice([("int", ()), ("float", ()), ("str", ()), ("bool",)])
            values = list(spec[1])
            if len(values) > 1 and random.random() < 0.4:
                values.pop(random.randrange(len(values)))
            elif (added := random.choice(CONSTANTS)) not in values:
                values.append(added)
            return (random.choice(["literal", kind]) if 1.5 not in values else kind, tuple(values))
        case "list" | "set":
            if random.random() < 0.4:
                sequence = random.choice(["list", "set"])
                is_hashable = kind == "set" or spec[1][0] in ("int", "str", "uuid", "float")
                lengths = random.choice([spec[2], random_lengths(random)])
                return (sequence if is_hashable else kind, spec[1], lengths)
            if kind == "set":
                return (kind, hashable(random), spec[2])
            return (kind, edited_spec(random, spec[1], depth + 1), spec[2])
        case "many":
            if random.random() < 0.2:
                return ("tuple", (spec[1],))
            return (kind, edited_spec(random, spec[1], depth + 1))
        case "tuple" | "union":
            parts = list(spec[1])
            fewest = 1 if kind == "union" else 0
            match random.randint(0, 3):
                case 0 if len(parts) > fewest:
                    parts.pop(random.randrange(len(parts)))
                case 1:
                    parts.insert(random.randint(0, len(parts)), random_spec(random, depth + 1))
                case 2:
                    random.shuffle(parts)
                case _ if parts:
                    index = random.randrange(len(parts))
                    parts[index] = edited_spec(random, parts[index], depth + 1)
            return (kind, tuple(parts))
        case "dict":
            match random.randint(0, 2):
                case 0:
                    return (kind, random.choice(KEYS), *spec[2:])
                case 1:
                    return (*spec[:2], edited_spec(random, spec[2], depth + 1), spec[3])
                case _:
                    return (*spec[:3], random_lengths(random))
        case "tagged":
            branches = list(spec[1])
            index = random.randrange(len(branches))
            tags, required, fields = branches[index]
            match random.randint(0, 4):
                case 0:
                    return ("model", dict(fields) | {"kind": (("literal", tags), required)})
                case 1 if len(branches) > 1:
                    branches.pop(index)
                case 2 if len(tags) > 1:
                    branches[index] = (tags[:1], required, fields)
                    branches.append((tags[1:], required, fields))
                case 3:
                    branches[index] = (tags, not required, fields)
                case _:
                    branches[index] = (tags, required, edited_fields(random, fields, depth + 1))
            return (kind, tuple(branches))
        case "model":
            return (kind, edited_fields(random, spec[1], depth + 1))
    return random_spec(random, depth + 1)


def job_type_of(random: Random, fields: Fields) -> JobType[Any] | None:
    """Return a job type whose payload has these fields.

    None: Pydantic refuses the model, or no payload of it is found.
    """
    try:
        model = _model("Root", fields)
        model.model_rebuild(_types_namespace={"Root": model})
    except SchemaError:
        return None
    for _ in range(30):
        example = random_object(random, fields, fields)
        try:
            model.model_validate_json(json.dumps(example), by_alias=True, by_name=False)
            return JobType(name="some.type", payload=model, example=example)
        except (ValidationError, DefinitionError):
            continue
    return None


def _model(name: str, fields: Fields, **more: Any) -> type[Payload]:
    definitions = {
        field: (type_of(spec), Field() if required else Field(default_factory=lambda: None))
        for field, (spec, required) in fields.items()
    }
    return create_model(name, __base__=Payload, __module__=__name__, **(definitions | more))


def _of(generic: Any, arguments: Any) -> Any:
    """Return a generic type of these arguments, which are known only at run time."""
    return generic[arguments]


def type_of(spec: Spec) -> Any:
    """Return the Python type of a spec."""
    kind = spec[0]
    if kind in PLAIN:
        return PLAIN[kind][0]
    match kind:
        case "self":
            return ForwardRef("Root") | None
        case "int" | "float" | "str" | "bytes" | "decimal":
            of = {"int": int, "float": float, "str": str, "bytes": bytes, "decimal": Decimal}[kind]
            bounds = dict(spec[1])
            if kind == "str" and bounds:
                return Annotated[of, StringConstraints(**bounds)]
            if kind == "decimal":
                digits = ("max_digits", "decimal_places")
                bounds = {k: v if k in digits else Decimal(str(v)) for k, v in bounds.items()}
            return Annotated[of, Field(**bounds)]
        case "literal":
            return Literal[spec[1]]
        case "enum":
            return enum.Enum("Choice", {f"V{i}": value for i, value in enumerate(spec[1])})
        case "list":
            return Annotated[_of(list, type_of(spec[1])), Field(**dict(spec[2]))]
        case "set":
            return Annotated[_of(set, type_of(spec[1])), Field(**dict(spec[2]))]
        case "many":
            return _of(tuple, (type_of(spec[1]), ...))
        case "tuple":
            return _of(tuple, tuple(map(type_of, spec[1])))
        case "dict":
            names, values = type_of(spec[1]), type_of(spec[2])
            return Annotated[_of(dict, (names, values)), Field(**dict(spec[3]))]
        case "union":
            return Union[tuple(map(type_of, spec[1]))]  # noqa: UP007
        case "tagged":
            models = [
                _model(
                    "Branch",
                    fields,
                    kind=(Literal[tags], Field() if required else Field(default=tags[0])),
                )
                for tags, required, fields in spec[1]
            ]
            if len(models) == 1:
                return models[0]
            return Annotated[Union[tuple(models)], Field(discriminator="kind")]  # noqa: UP007
    return _model("Part", spec[1])


def random_object(
    random: Random, fields: Fields, root: Fields, depth: int = 0
) -> dict[str, JsonValue]:
    """Return JSON that mostly fits a model."""
    found: dict[str, JsonValue] = {}
    for name, (spec, required) in fields.items():
        if required or random.random() < 0.5:
            found[name] = random_value(random, spec, root, depth + 1)
    if random.random() < 0.02:
        found[random.choice(NAMES)] = 1
    return found


def random_value(random: Random, spec: Spec, root: Fields, depth: int) -> JsonValue:
    """Return JSON that mostly fits a spec."""
    kind = spec[0]
    if random.random() < 0.02:
        return random.choice((*TEXTS, *NUMBERS, None, True, [], {}))
    if kind in PLAIN:
        return random.choice(PLAIN[kind][1])
    match kind:
        case "self":
            if depth > 3 or random.random() < 0.5:
                return None
            return random_object(random, root, root, depth)
        case "int":
            return random.choice([n for n in NUMBERS if isinstance(n, int)])
        case "float":
            return random.choice(NUMBERS)
        case "decimal":
            return str(random.choice((*NUMBERS, "1.25", "100", "99.5", "0.001", " 1.5")))
        case "str" | "bytes":
            return random.choice(TEXTS)
        case "literal" | "enum":
            value: JsonValue = random.choice(spec[1])
            if isinstance(value, int | float) and random.random() < 0.5:
                return random.choice([int(value), float(value), bool(value)])
            return value
        case "list" | "set" | "many":
            count = random.randint(0, 4)
            items = [random_value(random, spec[1], root, depth + 1) for _ in range(count)]
            return items + items[:1] * random.randint(0, 2)
        case "tuple":
            return [random_value(random, each, root, depth + 1) for each in spec[1]]
        case "dict":
            count = random.randint(0, 4)
            names = [str(random_value(random, spec[1], root, depth)) for _ in range(count)]
            return {name: random_value(random, spec[2], root, depth + 1) for name in names}
        case "union":
            return random_value(random, random.choice(spec[1]), root, depth)
        case "tagged":
            tags, required, fields = random.choice(spec[1])
            value = random_object(random, fields, root, depth)
            if required or random.random() < 0.7:
                value["kind"] = random.choice(tags)
            return value
    return random_object(random, spec[1], root, depth)
