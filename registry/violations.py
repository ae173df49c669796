"""Turns Pydantic's faults into violations: JSON Pointers into what the caller sent, and sentences.

Pydantic's locations also hold labels: the branch of a union, the tag of a discriminated union.
A label may look like a field, so `PayloadShape` reads a location along the model's core schema,
which says what each part is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, SchemaError, SchemaValidator

from job_registry.errors import FaultBudget, Violation, alternatives, shortened, shortened_text
from job_registry.json_values import MAX_VIOLATIONS, json_document, pointer_of
from job_registry.wire_text import MAPPINGS

MAX_COLLECTED: Final = 2_000
"""Faults that Pydantic lists at once. 256 KiB of `{}` may have a million, which take 2 GB."""

MAX_EXAMINED: Final = 1_000
"""Faults of one payload that are read."""

MAX_COLLECTED_TEXT: Final = 20_000_000
"""Characters of Pydantic's own sentences that are made at once. Each one about an enum or a literal
lists all of its values: 17,000 faults of an enum of 5,000 values took 40 seconds and 6 GB."""

_MAX_LISTED: Final = 10
_OBJECTS: Final = ("model-fields", "typed-dict", "dataclass-args", *MAPPINGS)
_ARRAYS: Final = ("list", "tuple", "named-tuple", "set", "frozenset", "deque")
_UNBOUNDED: Final = 1 << 62
_MAX_COMPARED: Final = 1_000
_ELLIPSIS: Final = "..."
_MISSING: Final = object()


class PayloadShape:
    """What a payload model says about the parts of a location: field, index or label."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._model = model
        self._schema: Any = TypeAdapter(model).core_schema
        self._definitions: dict[str, Any] = {}
        if self._schema["type"] == "definitions":
            for definition in self._schema["definitions"]:
                self._definitions[definition["ref"]] = definition
        self._labels: dict[int, list[str]] = {}
        self._most = min(MAX_COLLECTED, MAX_COLLECTED_TEXT // _longest_choice(self._schema))

    def violations(
        self,
        error: ValidationError,
        sent: object,
        known: Sequence[Violation] = (),
        budget: FaultBudget | None = None,
    ) -> list[Violation]:
        """Return what is wrong with `sent`, sorted by path, up to 100 and one that counts the rest.

        Of a union only the branch that fits best is reported. The violations `known` are included,
        and hide Pydantic's own at their paths. All are charged to the budget of the request; once
        it is spent, one violation counts them.
        """
        budget = budget or FaultBudget()
        if budget.is_spent:
            return [budget.unlisted("The payload", error.error_count() + len(known))]
        smaller = self._with_fewer_faults(error, sent)
        if smaller is None:
            message = f"The payload has {error.error_count():,} faults, too many to list."
            return [Violation("", "more", message), *known]
        unexamined = smaller.error_count() > MAX_EXAMINED or smaller is not error
        details = smaller.errors(include_url=False, include_input=False)
        faults = [self._fault(detail, sent) for detail in islice(details, MAX_EXAMINED)]
        hidden = {violation.path for violation in known}
        found: dict[tuple[str, str, object], _Fault] = {}
        for fault in _best_fitting(faults, 0):
            path = pointer_of(fault.path)
            if path not in hidden:
                found.setdefault((path, fault.code, fault.expected or fault.name), fault)
        listed: list[Violation | tuple[str, _Fault]] = [*known]
        listed += ((path, fault) for (path, _, _), fault in found.items())
        listed.sort(key=lambda each: each.path if isinstance(each, Violation) else each[0])
        violations = []
        for each in listed[:MAX_VIOLATIONS]:
            if isinstance(each, Violation):
                violations.append(each)
                continue
            path, fault = each
            violations.append(fault.violation(path, sent, budget))
        if unexamined or len(listed) > MAX_VIOLATIONS:
            more = f"{len(listed) - len(violations):,} more faults"
            text = f"More than {more.replace(' more', ' other')}" if unexamined else more
            violations.append(Violation("", "more", f"{text} are not listed."))
        return list(budget.listed("The payload", violations, examined=len(faults)))

    def _with_fewer_faults(self, error: ValidationError, sent: object) -> ValidationError | None:
        """Return the error, or if it has too many faults, that of the first items of each array.

        Pydantic can only list all faults of an error at once.
        """
        for kept in (100, 10, 1):
            if error.error_count() <= self._most:
                break
            smaller = _first_items(sent, kept)
            if smaller == sent:
                # Ambiguous unions multiply: Pydantic would take as long again, for the same.
                continue
            text, _ = json_document(smaller, max_bytes=_UNBOUNDED)
            try:
                self._model.model_validate_json(text, by_alias=True, by_name=False)
            except ValidationError as fewer:
                error = fewer
            else:
                return None
        return error if error.error_count() <= self._most else None

    def _fault(self, detail: ErrorDetails, sent: object) -> _Fault:
        place = self._place(detail["loc"], sent)
        kind, context = detail["type"], detail.get("ctx", {})
        path = _within(sent, place.path, keep_last=kind == "missing")
        name = str(place.path[-1]) if place.path else ""
        if kind == "missing":
            return _Fault(path, "required", place.unions, name=name)
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            return _Fault(path, "unknown_field", place.unions, name=name, near=place.names)
        if kind in ("union_tag_invalid", "union_tag_not_found"):
            return _tag_fault(kind, self._settled(place.schema), path, place.unions, sent)
        code = _CODES.get(kind, "invalid_format" if "pars" in kind else "refused")
        schema = self._settled(place.schema)
        allowed = _allowed(schema) if code == "not_one_of" else ()
        expected = (
            _one_of(allowed, len(_choices(schema)))
            if allowed
            else _expected(kind, detail["msg"], context)
        )
        reason = ""
        if not expected:
            # A validator may raise an error without a message: `assert value > 0`.
            reason = str(context.get("error", detail["msg"])) or "The value is not allowed"
        return _Fault(
            path,
            code,
            place.unions,
            expected=expected,
            reason=reason,
            near=tuple(value for value in allowed if isinstance(value, str)),
            key=place.key,
        )

    def _place(self, location: Sequence[int | str], sent: object) -> _Place:
        """Read a location along the schema."""
        schema: Any = self._schema
        path: list[int | str] = []
        unions: list[_Branch] = []
        names: tuple[str, ...] = ()
        parts = list(location)
        while parts:
            schema = self._settled(schema)
            kind = schema["type"] if schema else None
            if kind in ("union", "tagged-union"):
                label = str(parts.pop(0))
                if kind == "union":
                    number, schema = self._branch(schema, label, parts)
                    unions.append(_Branch(tuple(path), number))
                else:
                    schema = _tagged(schema, label)
                continue
            if kind == "json":
                # The further parts are inside the text of a string.
                break
            is_key = kind in MAPPINGS and parts[1:2] == ["[key]"] and _may_refuse_keys(schema)
            # Pydantic's label for a faulty key, unless an object below has this very key.
            if is_key and value_at(sent, [*path, *parts[:2]]) is _MISSING:
                return _Place((*path, parts[0]), tuple(unions), None, key=str(parts[0]))
            names, schema, taken = self._below(schema, parts)
            path += parts[:taken]
            del parts[:taken]
        return _Place(tuple(path), tuple(unions), schema, names=names)

    def _below(self, schema: Any, parts: Sequence[int | str]) -> tuple[tuple[str, ...], Any, int]:
        """Return the names of the fields here, the schema one step below, and the parts it took."""
        kind = schema["type"] if schema else None
        if kind in ("model-fields", "typed-dict", "dataclass-args"):
            fields = schema["fields"]
            named = (
                fields.items() if isinstance(fields, Mapping) else [(f["name"], f) for f in fields]
            )
            names = []
            for name, field in named:
                aliases = _aliases(field.get("validation_alias"), name)
                names += [alias[0] for alias in aliases if len(alias) == 1]
                for alias in aliases:
                    if list(parts[: len(alias)]) == alias:
                        return (), field["schema"], len(alias)
            return tuple(names[:_MAX_COMPARED]), schema.get("extras_schema"), 1
        if kind in MAPPINGS:
            return (), schema.get("values_schema"), 1
        if kind == "named-tuple":
            fields = schema["fields"]
            is_item = isinstance(parts[0], int) and parts[0] < len(fields)
            return (), fields[parts[0]]["schema"] if is_item else None, 1
        if kind == "tuple":
            items, variadic = schema["items_schema"], schema.get("variadic_item_index")
            index = parts[0] if isinstance(parts[0], int) else 0
            if variadic is not None and index >= variadic:
                index = variadic
            return (), items[index] if index < len(items) else None, 1
        return (), schema.get("items_schema") if schema else None, 1

    def _settled(self, schema: Any) -> Any:
        """Return the schema below those that add nothing to a location."""
        while schema:
            match schema["type"]:
                case "definitions":
                    schema = schema["schema"]
                case "definition-ref":
                    schema = self._definitions.get(schema["schema_ref"])
                case "lax-or-strict":
                    schema = schema["strict_schema"]
                case "json-or-python":
                    schema = schema["json_schema"]
                case "chain":
                    schema = schema["steps"][0]
                case "json":
                    return schema
                case _ if "schema" in schema:
                    schema = schema["schema"]
                case _:
                    return schema
        return None

    def _branch(self, schema: Any, label: str, below: Sequence[int | str]) -> tuple[int, Any]:
        """Return the branch of a union that Pydantic calls by this label, and its number.

        Two branches may share a label, such as models of one name. Then the parts `below` decide.
        """
        labels = self._labels.get(id(schema))
        if labels is None:
            labels = [self._label(choice) for choice in schema["choices"]]
            self._labels[id(schema)] = labels
        numbers = [number for number, each in enumerate(labels) if each == label]
        if not numbers and _ELLIPSIS in label:
            # Pydantic writes so what is inside itself; `_label` has its name.
            pattern = re.compile(".*".join(map(re.escape, label.split(_ELLIPSIS))))
            numbers = [number for number, each in enumerate(labels) if pattern.fullmatch(each)]
        if not numbers:
            bare = _bare(label)
            numbers = [number for number, each in enumerate(labels) if _bare(each) == bare]
        if not numbers:
            return -1, None
        choices = [c[0] if isinstance(c, tuple) else c for c in schema["choices"]]
        best = max(numbers, key=lambda number: self._admits(choices[number], below))
        return best, choices[best]

    def _admits(self, schema: Any, below: Sequence[int | str]) -> int:
        """Return how well the rest of a location fits this schema."""
        schema = self._settled(schema)
        kind = schema["type"] if schema else ""
        if not below:
            return int(kind not in _OBJECTS + _ARRAYS)
        if isinstance(below[0], int):
            return int(kind in _ARRAYS)
        names, _, _ = self._below(schema, below)
        return int(kind in _OBJECTS) * (2 if kind not in MAPPINGS and not names else 1)

    def _label(self, choice: Any) -> str:
        if isinstance(choice, tuple):
            return str(choice[1])
        definitions = list(self._definitions.values())
        try:
            return SchemaValidator(
                {"type": "definitions", "schema": choice, "definitions": definitions}
            ).title
        except SchemaError:
            return ""


@dataclass(frozen=True, slots=True)
class _Branch:
    """A branch that a location takes: where the union is, and the number of the branch."""

    path: tuple[int | str, ...]
    number: int


@dataclass(frozen=True, slots=True)
class _Place:
    """A location that was read. `key` is set where the key of an object is at fault."""

    path: tuple[int | str, ...]
    unions: tuple[_Branch, ...]
    schema: Any
    names: tuple[str, ...] = ()
    key: str | None = None


@dataclass(frozen=True, slots=True)
class _Fault:
    """A fault before its sentence is written: `near` are the names or values that were possible."""

    path: tuple[int | str, ...]
    code: str
    unions: tuple[_Branch, ...]
    expected: tuple[str, ...] = ()
    reason: str = ""
    name: str = ""
    near: tuple[str, ...] = ()
    key: str | None = None

    def violation(self, path: str, sent: object, budget: FaultBudget) -> Violation:
        """Return the violation, with its sentence."""
        return Violation(path, self.code, self._message(sent, budget))

    def _message(self, sent: object, budget: FaultBudget) -> str:
        if self.code == "required":
            return f"The required field {shortened(self.name)} is missing."
        if self.code == "unknown_field":
            hint = budget.suggestion(self.name, self.near)
            return f"There is no field {shortened(self.name)}.{hint}"
        value = self.key if self.key is not None else value_at(sent, self.path)
        if self.reason:
            return f"{shortened_text(self.reason).rstrip('.')}; got {shortened(value)}."
        hint = ""
        if self.near and isinstance(value, str):
            found = budget.near(value, self.near)
            hint = "".join(f" Did you mean {shortened(each)}?" for each in found)
        return shortened_text(
            f"Expected {alternatives(self.expected)}; got {shortened(value)}.{hint}", 400
        )


def _bare(label: str) -> str:
    """Return a label without the readers of a `Payload`. Pydantic calls the parts of a class that
    is not one as the class has compiled them for itself."""
    while (bare := _READER.sub(r"\1", label)) != label:
        label = bare
    return label


_READER: Final = re.compile(r"function-before\[\w+\(\), ([^\[\]]*)\]")


def _may_refuse_keys(schema: Mapping[str, Any]) -> bool:
    """Return whether a dict's keys, strings in JSON, may be faulty: plain strings never are."""
    keys = schema.get("keys_schema", {})
    return keys.get("type") != "str" or not keys.keys() <= {"type", "strict", "metadata"}


def _tagged(schema: Any, label: str) -> Any:
    """Return the branch of a discriminated union that has this tag."""
    for tag, choice in schema["choices"].items():
        if label in (str(tag), str(getattr(tag, "value", tag))):
            return choice
    return None


def _best_fitting(faults: list[_Fault], depth: int) -> list[_Fault]:
    """Return the faults without those of branches that fit worse than another of their union."""
    kept: list[_Fault] = []
    unions: dict[tuple[int | str, ...], dict[int, list[_Fault]]] = {}
    for fault in faults:
        if len(fault.unions) <= depth:
            kept.append(fault)
        else:
            branch = fault.unions[depth]
            unions.setdefault(branch.path, {}).setdefault(branch.number, []).append(fault)
    for path, branches in unions.items():
        best = [_best_fitting(branch, depth + 1) for branch in branches.values()]
        fits = [(_misfit(branch, len(path)), branch) for branch in best]
        (misfit, _, _), chosen = min(fits, key=lambda fit: fit[0])
        kept += chosen if misfit == 0 else [_none_fits([f for _, b in fits for f in b], len(path))]
    return kept


def _misfit(branch: Sequence[_Fault], length: int) -> tuple[int, int, int]:
    """Return how badly a branch fits: the kind of its value, the number of faults, their depth."""
    worst = max((_MISFITS.get(f.code, 0) for f in branch if len(f.path) <= length), default=0)
    return worst, len(branch), -min(len(fault.path) for fault in branch)


_MISFITS: Final = {"wrong_type": 2, "not_one_of": 1, "invalid_format": 1}


def _none_fits(faults: Sequence[_Fault], length: int) -> _Fault:
    """Return one fault of a union that says what each of its branches expects."""
    own = [fault for fault in faults if len(fault.path) <= length and fault.expected]
    codes = {fault.code for fault in own}
    return _Fault(
        own[0].path,
        codes.pop() if len(codes) == 1 else "wrong_type",
        own[0].unions,
        expected=tuple(dict.fromkeys(word for fault in own for word in fault.expected)),
        near=tuple(value for fault in own for value in fault.near),
        key=own[0].key,
    )


def _tag_fault(
    kind: str, schema: Any, path: tuple[int | str, ...], unions: tuple[_Branch, ...], sent: object
) -> _Fault:
    """Return the fault of a discriminated union, at its discriminator."""
    discriminator = schema.get("discriminator") if schema else None
    tags = tuple(getattr(tag, "value", tag) for tag in schema["choices"]) if schema else ()
    expected = _one_of(tags, len(tags))
    texts = tuple(tag for tag in tags if isinstance(tag, str))
    if not isinstance(discriminator, str | list):
        return _Fault(path, "not_one_of", unions, expected=expected, near=texts)
    below: list[int | str] = _aliases(discriminator, "")[0]
    if kind == "union_tag_not_found":
        name = str(below[-1])
        at = _within(sent, (*path, *below), keep_last=True)
        return _Fault(at, "required", unions, name=name)
    at = _within(sent, (*path, *below), keep_last=False)
    return _Fault(at, "not_one_of", unions, expected=expected, near=texts)


def _aliases(alias: Any, name: str) -> list[list[Any]]:
    """Return the paths that a field is read from: those of its alias, then its name."""
    if alias is None:
        return [[name]]
    if isinstance(alias, str):
        return [[alias]]
    return [list(path) for path in alias] if isinstance(alias[0], list) else [list(alias)]


def _within(sent: object, path: Sequence[int | str], *, keep_last: bool) -> tuple[int | str, ...]:
    """Return the part of a path that is in the document. `keep_last` is for a missing field."""
    value = sent
    for index, part in enumerate(path):
        value = _item(value, part)
        if value is _MISSING:
            is_field = keep_last and index == len(path) - 1
            parent = value_at(sent, path[:index])
            return tuple(path[: index + (is_field and isinstance(parent, dict | list))])
    return tuple(path)


def _first_items(value: object, kept: int) -> object:
    """Return a document with the first items of each array, and ten times as many fields."""
    if isinstance(value, dict):
        fields = islice(value.items(), kept * 10)
        return {name: _first_items(item, kept) for name, item in fields}
    if isinstance(value, list):
        return [_first_items(item, kept) for item in islice(value, kept)]
    return value


def value_at(document: object, path: Iterable[int | str]) -> object:
    """Return the value at a path; `_MISSING` where the document has none."""
    for part in path:
        document = _item(document, part)
    return document


def _item(value: object, part: int | str) -> Any:
    if isinstance(value, dict):
        return value.get(part if part in value else str(part), _MISSING)
    if isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value):
        return value[part]
    return _MISSING


def _choices(schema: Any) -> Sequence[Any]:
    """Return the values that a literal or an enum admits."""
    return (schema.get("expected") or schema.get("members") or ()) if schema else ()


def _allowed(schema: Any) -> tuple[Any, ...]:
    """Return up to 1,000 of the values that a literal or an enum admits, as JSON has them."""
    values: Iterator[Any] = iter(_choices(schema))
    return tuple(getattr(value, "value", value) for value in islice(values, _MAX_COMPARED))


def _longest_choice(schema: object) -> int:
    """Return the length of the longest list of values that a literal or an enum admits."""
    longest = 1
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            values = each.get("expected" if each.get("type") == "literal" else "members")
            if isinstance(values, list):
                longest = max(longest, sum(len(str(value)) + 4 for value in values))
            waiting += [below for key, below in each.items() if key != "metadata"]
        elif isinstance(each, list | tuple):
            waiting += each
    return longest


def _one_of(values: Sequence[Any], count: int) -> tuple[str, ...]:
    listed = tuple(shortened(value) for value in values[:_MAX_LISTED])
    if count > _MAX_LISTED:
        return (f"one of {count:,} values, such as {alternatives(listed)}",)
    return listed


_CODES: Final = {
    "model_type": "wrong_type",
    "model_attributes_type": "wrong_type",
    "dataclass_type": "wrong_type",
    "dict_type": "wrong_type",
    "mapping_type": "wrong_type",
    "list_type": "wrong_type",
    "tuple_type": "wrong_type",
    "set_type": "wrong_type",
    "frozen_set_type": "wrong_type",
    "string_type": "wrong_type",
    "bytes_type": "wrong_type",
    "int_type": "wrong_type",
    "float_type": "wrong_type",
    "bool_type": "wrong_type",
    "none_required": "wrong_type",
    "date_type": "wrong_type",
    "datetime_type": "wrong_type",
    "time_type": "wrong_type",
    "time_delta_type": "wrong_type",
    "url_type": "wrong_type",
    "uuid_type": "wrong_type",
    "decimal_type": "wrong_type",
    "enum": "not_one_of",
    "literal_error": "not_one_of",
    "greater_than": "out_of_range",
    "greater_than_equal": "out_of_range",
    "less_than": "out_of_range",
    "less_than_equal": "out_of_range",
    "multiple_of": "out_of_range",
    "decimal_max_digits": "out_of_range",
    "decimal_max_places": "out_of_range",
    "decimal_whole_digits": "out_of_range",
    "string_too_short": "too_short",
    "too_short": "too_short",
    "string_too_long": "too_long",
    "too_long": "too_long",
    "string_pattern_mismatch": "pattern_mismatch",
    "value_error": "refused",
    "assertion_error": "refused",
}
"""Pydantic's error types as our codes, which stay when Pydantic renames its own. The rest ends in
`_parsing`, `_from_date_parsing` and the like, and is `invalid_format`."""

DATE: Final = "a date in ISO 8601, such as 2030-01-31"
DATE_TIME: Final = "a date and time in ISO 8601, such as 2030-01-31T12:00:00Z"
_TIME: Final = "a time of day in ISO 8601, such as 12:00:00Z"
_DURATION: Final = "a duration in ISO 8601, such as PT30S"
_UUID: Final = "a UUID, such as 3f2504e0-4f89-41d3-9a0c-0305e82c3301"
_DECIMAL: Final = 'a decimal number as a string, such as "12.50"'
_URL: Final = "a URL, such as https://example.com/"

_EXPECTED: Final = {
    "string_type": "a string",
    "bytes_type": "a string",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "none_required": "null",
    "list_type": "an array",
    "tuple_type": "an array",
    "set_type": "an array",
    "frozen_set_type": "an array",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dataclass_type": "an object",
    "decimal_type": _DECIMAL,
    "decimal_parsing": _DECIMAL,
    "date_type": DATE,
    "date_parsing": DATE,
    "date_from_datetime_parsing": DATE,
    "date_from_datetime_inexact": DATE,
    "date_past": "a date in the past",
    "date_future": "a date in the future",
    "datetime_type": DATE_TIME,
    "datetime_parsing": DATE_TIME,
    "datetime_object_invalid": DATE_TIME,
    "datetime_from_date_parsing": DATE_TIME,
    "datetime_past": "a date and time in the past",
    "datetime_future": "a date and time in the future",
    "timezone_aware": f"{DATE_TIME}, with its offset from UTC",
    "timezone_naive": "a date and time without an offset, such as 2030-01-31T12:00:00",
    "time_type": _TIME,
    "time_parsing": _TIME,
    "time_delta_type": _DURATION,
    "time_delta_parsing": _DURATION,
    "uuid_type": _UUID,
    "uuid_parsing": _UUID,
    "uuid_version": "a UUID of version {expected_version}",
    "url_type": _URL,
    "url_parsing": _URL,
    "url_syntax_violation": _URL,
    "url_scheme": "a URL with the scheme {expected_schemes}",
    "greater_than": "a value greater than {gt}",
    "greater_than_equal": "a value of at least {ge}",
    "less_than": "a value less than {lt}",
    "less_than_equal": "a value of at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "decimal_max_digits": "a decimal number of at most {max_digits} digits",
    "decimal_max_places": "a decimal number of at most {decimal_places} decimal places",
    "decimal_whole_digits": "a decimal number of at most {whole_digits} digits before the point",
    "string_too_short": "a string of at least {min_length} characters",
    "string_too_long": "a string of at most {max_length} characters",
    "string_pattern_mismatch": "a string that matches {pattern}",
}


def _expected(kind: str, message: str, context: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what was expected; nothing where only the message of a validator says it."""
    if kind in ("too_short", "too_long"):
        kind_of_value = str(context.get("field_type", "")).lower()
        is_object = "dict" in kind_of_value or kind_of_value == "counter"
        what, unit = ("an object", "fields") if is_object else ("an array", "items")
        bound = "at least" if kind == "too_short" else "at most"
        count = context.get("min_length" if kind == "too_short" else "max_length")
        return (_in_singular(f"{what} of {bound} {count} {unit}"),)
    if kind in _EXPECTED:
        return (_in_singular(_EXPECTED[kind].format_map(context)),)
    rest = message.removeprefix("Input should be ")
    return (rest,) if rest != message else ()


def _in_singular(text: str) -> str:
    """Return the text with "1 character" for "1 characters"."""
    return re.sub(r"\b(1 (?:character|digit|decimal place|field|item))s\b", r"\1", text)
