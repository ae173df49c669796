"""Compares two JSON Schemas, draft 2020-12: what one admits and the other refuses.

It reads only the schemas, and no payloads. Where it is unsure, it reports a difference. Checks in
Python code, such as those of a validator, are not part of a schema and are not compared.

Where JSON Schema and Pydantic differ, it follows Pydantic: the items of a set may repeat in JSON,
and a `discriminator` requires its field. The constant 1.0 is not counted as an integer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeGuard

from job_registry.errors import alternatives, shortened
from job_registry.json_values import MAX_DEPTH, names_in, pointer

MAX_DIFFERENCES: Final = 100
"""Differences that one comparison returns."""

MAX_COMPARISONS: Final = 20_000
"""Pairs of schemas that are compared. Further pairs are reported as uncertain."""

MAX_ALTERNATIVES: Final = 500
"""Combinations of the branches of several unions that are compared."""

_MAX_PARTS: Final = 100
_MAX_SAFE_INT: Final = 2**53

_Node = Mapping[str, Any]
_Nodes = tuple[_Node, ...]
"""Schemas that a value has to fit all at once."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One place where a value that was admitted is refused, or may be.

    `path` is a JSON Pointer into a payload, such as "/sizes/*/width": "*" is any item or entry, and
    "" the whole payload. `before` and `after` are what is required, in short words: "optional",
    "integer", "at most 100". `reason` is a sentence. `is_certain` is False where the comparison
    cannot decide, for example between two patterns.
    """

    path: str
    before: str
    after: str
    reason: str
    is_certain: bool


def narrowings(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return what `before` admits and `after` refuses, or may refuse, up to 100 differences.

    Empty: every value that `before` admits is admitted by `after`.
    """
    try:
        comparison = _Comparison(before, after)
        return () if comparison.are_same else comparison.compare((before,), after, 0)
    except RecursionError:
        return (_uncertain("The schemas are nested too deep to be compared."),)


def changed_defaults(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return the fields whose default changed: a payload without the field now means another value.

    No payload is refused because of it. The difference is uncertain if `after` states no default,
    because a function makes it or because the field is required.
    """
    found: dict[tuple[str, str, str], Difference] = {}
    for path, old, new in _paired(before, after):
        if "default" not in old or len(found) >= MAX_DIFFERENCES:
            continue
        was = _text(old["default"])
        if "default" not in new:
            now, reason = "no stated default", "The default is no longer stated in the schema."
        elif (now := _text(new["default"])) == was:
            continue
        else:
            now = f"default {shortened(new['default'])}"
            reason = "A payload without this field now means another value."
        was = f"default {shortened(old['default'])}"
        difference = Difference(path, was, now, reason, "default" in new)
        found.setdefault((path, was, now), difference)
    return tuple(found.values())


class _Comparison:
    """One run: what is known about pairs of schemas, and how much was compared.

    A pair that is being compared is assumed to be compatible, so that recursive models end. What
    was found compatible under that assumption is forgotten if the pair turns out to differ.
    """

    def __init__(self, before: _Node, after: _Node) -> None:
        self._before = before
        self._after = after
        self._texts: dict[int, str] = {}
        self._flat_nodes: dict[int, _Node] = {}
        self._made: dict[tuple[str, ...], _Node] = {}
        self._branches: dict[int, list[_Nodes]] = {}
        self._known: dict[_Pair, tuple[Difference, ...]] = {}
        self._open: set[_Pair] = set()
        self._assumed: set[_Pair] = set()
        self._held: list[_Pair] = []
        self._count = 0
        self._same_definitions = self._find_same_definitions()

    @property
    def are_same(self) -> bool:
        """Whether the two whole schemas are the same, apart from annotations."""
        return _WHOLE in self._same_definitions

    def compare(self, before: _Nodes, after: _Node | bool, depth: int) -> tuple[Difference, ...]:
        """Return what all of `before` together admit and `after` refuses, with paths from here."""
        after = _node(after)
        if any(self._is_same(node, after) for node in before):
            return ()
        key = _Pair(frozenset(map(id, before)), id(after))
        if key in self._known:
            return self._known[key]
        if key in self._open:
            self._assumed.add(key)
            return ()
        if depth > MAX_DEPTH:
            return (_uncertain(f"More than {MAX_DEPTH} levels of nesting are not compared."),)
        self._count += 1
        if self._count > MAX_COMPARISONS:
            return (_uncertain("The schemas are too large to be compared in full."),)
        self._open.add(key)
        start = len(self._held)
        found: dict[Difference, None] = {}
        views = [_View(nodes) for nodes in self._alternatives(before, self._before)]
        for view in views:
            for each in self._refused(view, after, depth):
                if each.path == "" and each.before == view.words:
                    each = replace(each, before=alternatives(v.words for v in views))
                found[each] = None
            if len(found) > MAX_DIFFERENCES:
                break
        self._open.remove(key)
        differences = tuple(found)[:MAX_DIFFERENCES]
        if not differences:
            self._held.append(key)
        elif key in self._assumed:
            for held in self._held[start:]:
                self._known.pop(held, None)
            del self._held[start:]
        self._assumed.discard(key)
        self._known[key] = differences
        return differences

    def _refused(self, view: _View, after: _Node, depth: int) -> Iterator[Difference]:
        """Yield what one alternative admits, and `after` refuses."""
        if view.is_empty:
            return
        if _is_nothing(after):
            yield _difference(
                view, view.words, "nothing", "No value is admitted here any more.", True
            )
            return
        if "$ref" in after:
            target = _resolved(after["$ref"], self._after)
            if target is None:
                yield _uncertain(f"The reference {shortened(after['$ref'])} cannot be followed.")
            else:
                yield from self.compare(view.nodes, target, depth)
        for part in after.get("allOf", ()):
            yield from self.compare(view.nodes, part, depth)
        if "anyOf" in after:
            yield from self._outside_union(view, after["anyOf"], None, depth)
        if "oneOf" in after:
            tag = _tag_of(after)
            if tag is not None:
                yield from self._outside_union(view, after["oneOf"], tag, depth)
            elif not self._has_same(view, _ONE_OF, after["oneOf"]):
                yield _uncertain("Exactly one of several schemas has to fit (oneOf).")
        yield from self._unknown_keywords(view, after)
        yield from _refused_types(view, after)
        yield from _refused_values(view, after)
        types = view.types & _types_of(after)
        if types & _NUMBERS or ("string" in types and after.get("format") in _READ):
            yield from _refused_numbers(view, after)
        if "string" in types:
            yield from _refused_strings(view, after)
        if "array" in types:
            yield from self._refused_arrays(view, after, depth)
        if "object" in types:
            yield from self._refused_objects(view, after, depth)

    def _unknown_keywords(self, view: _View, after: _Node) -> Iterator[Difference]:
        """Yield a difference for each keyword of `after` whose effect is not known."""
        for key, value in after.items():
            if key in _COMPARED or key in _ANNOTATIONS or key.startswith("x-"):
                continue
            if key not in _NOT_LOCAL and all(
                self._has_same(view, each, after.get(each, _MISSING))
                for each in _GROUPS.get(key, (key,))
            ):
                continue
            yield Difference(
                "",
                _keyword_words(key, next((n[key] for n in view.nodes if key in n), _MISSING)),
                _keyword_words(key, value),
                f"The schemas alone do not show whether {key} admits the same values.",
                False,
            )

    def _refused_arrays(self, view: _View, after: _Node, depth: int) -> Iterator[Difference]:
        if isinstance(after.get("items"), list):
            yield _uncertain("A list as `items` belongs to an older draft of JSON Schema.", "/*")
            return
        was_set, is_set = view.any_true("uniqueItems"), after.get("uniqueItems") is True
        longest = _least(view.numbers("maxItems"))
        shortest = _greatest(view.numbers("minItems"), 0)
        is_alike = True
        if was_set:
            # JSON may repeat the items of a Python set: only the length of the set is bounded.
            is_alike = is_set and any(
                self._is_same_value(node.get("items", True), after.get("items", True))
                for node in view.nodes
            )
            if not is_alike:
                longest, shortest = math.inf, min(shortest, 1) if is_set else shortest
        if is_set and not was_set and longest > 1:
            yield Difference(
                "", "items may repeat", "items are unique", "Repeated items may be refused.", False
            )
        yield from _refused_sizes(
            view,
            after,
            ("minItems", "maxItems"),
            (shortest, longest),
            "item",
            not was_set,
            is_alike,
        )
        count = max(len(node.get("prefixItems", ())) for node in (*view.nodes, after, _NO_DEMANDS))
        for index in range(count):
            if index < longest:
                items = view.items(index)
                found = self.compare(items, _item_of(after, index), depth + 1)
                yield from _below(str(index), found)
        if count < longest:
            found = self.compare(view.items(count), _item_of(after, count), depth + 1)
            yield from _below("*", found)

    def _refused_objects(self, view: _View, after: _Node, depth: int) -> Iterator[Difference]:
        properties = after.get("properties", {})
        required = after.get("required", ())
        names = dict.fromkeys([*view.names, *properties])
        for name in names:
            admitted = view.field(name)
            if any(map(_is_nothing, admitted)):
                continue
            for demand in _property_of(after, name, maybe=True):
                if _is_nothing(demand):
                    was = "required" if name in view.required else "optional"
                    reason = "The field was removed, and unknown fields are refused."
                    removed = _difference(view, was, "not a field", reason, True)
                    yield from _below(name, (removed,))
                else:
                    yield from _below(name, self.compare(admitted, demand, depth + 1))
        for name in required:
            if name not in view.required:
                is_field = name in view.names or not any(map(_is_nothing, view.field(name)))
                was = "optional" if is_field else "not a field"
                reason = "A payload without this field is refused."
                difference = _difference(view, was, "required", reason, True)
                yield from _below(name, (difference,))
        yield from self._refused_entries(view, after, depth)
        shortest = _greatest(view.numbers("minProperties"), len(view.required))
        longest = _least(view.numbers("maxProperties"))
        if view.is_closed:
            longest = min(longest, len(view.names))
        yield from _refused_sizes(
            view, after, ("minProperties", "maxProperties"), (shortest, longest), "field", True
        )

    def _refused_entries(self, view: _View, after: _Node, depth: int) -> Iterator[Difference]:
        """Yield what is refused among the entries whose names are in neither schema."""
        patterns = after.get("patternProperties", {})
        demands: list[tuple[str | None, _Node]] = [(key, _node(patterns[key])) for key in patterns]
        if "additionalProperties" in after:
            demands.append((None, _node(after["additionalProperties"])))
        for pattern, demand in demands:
            for entries in view.entries(pattern, patterns):
                if not _is_nothing(demand):
                    yield from _below("*", self.compare(entries, demand, depth + 1))
                elif self._alternatives(entries, self._before):
                    reason = "Fields that the schema does not name are refused."
                    is_certain = _VAGUE not in entries
                    found = _difference(view, "any field", "no other fields", reason, is_certain)
                    yield from _below("*", (found,))
        if "propertyNames" in after:
            names = [_STRING, *map(self._name_schema, view.all("propertyNames"))]
            if view.is_closed:
                every = ("names", *view.names)
                names.append(self._made.setdefault(every, {"enum": list(view.names)}))
            for each in self.compare(tuple(names), after["propertyNames"], depth + 1):
                reason = f"The name of an entry: {each.reason}"
                yield replace(
                    each,
                    path="/*",
                    before=f"name: {each.before}",
                    after=f"name: {each.after}",
                    reason=reason,
                )

    def _name_schema(self, schema: Any) -> _Node:
        """Return what `before` requires of names. Pydantic reads numeric keys from text."""
        alternatives = self._alternatives((_node(schema),), self._before)
        is_text = alternatives and all("string" in _View(each).types for each in alternatives)
        return _node(schema) if is_text else _VAGUE

    def _outside_union(
        self, view: _View, branches: Sequence[Any], tag: str | None, depth: int
    ) -> tuple[Difference, ...]:
        """Return what is refused by every branch; nothing if the branches together admit it all."""
        nodes = [self._branch(_node(branch), tag) for branch in branches]
        near = []
        for branch in nodes:
            if all(view.excludes(_View(each)) for each in self._alternatives_after(branch)):
                continue
            found = self.compare(view.nodes, branch, depth)
            if not found:
                return ()
            near.append(found)
        parts = list(self._parts(view, tag))
        if 1 < len(parts) <= _MAX_PARTS:
            every: dict[Difference, None] = {}
            for part in parts:
                smaller = _View((*view.nodes, part))
                if not smaller.is_empty:
                    every |= dict.fromkeys(self._outside_union(smaller, branches, tag, depth))
            return tuple(every)
        if not near and tag is not None and view.types == {"object"}:
            was = _View(view.field(tag)).values
            tags = [
                text
                for branch in nodes
                for each in self._alternatives_after(branch)
                for text in _View(_View(each).field(tag)).values or ()
            ]
            if was is not None and tags:
                reason = f"{_sentence(_values_words(was))} is refused."
                found = (_difference(view, _values_words(was), _values_words(tags), reason, True),)
                return tuple(_below(tag, found))
        if not near:
            kinds = [_View(each).words for b in nodes for each in self._alternatives_after(b)]
            now = alternatives(dict.fromkeys(kinds))
            reason = f"{_sentence(view.words)} is not among what is admitted."
            return (_difference(view, view.words, now, reason, not view.has_numeric_values),)
        best = min(near, key=len)
        if len(near) == 1:
            return best
        return tuple(replace(each, is_certain=False) for each in best)

    def _alternatives_after(self, branch: _Node) -> list[_Nodes]:
        """Return the alternatives of a branch of a union in `after`."""
        found = self._branches.get(id(branch))
        if found is None:
            found = self._branches[id(branch)] = self._alternatives((branch,), self._after)
        return found

    def _branch(self, branch: _Node, tag: str | None) -> _Node:
        """Return a branch of a union, which requires the tag of a discriminated one."""
        if tag is None:
            return branch
        key = (f"branch {id(branch)}", tag)
        if key not in self._made:
            self._made[key] = {"allOf": [branch, self._make_required(tag)]}
        return self._made[key]

    def _make_required(self, name: str) -> _Node:
        return self._made.setdefault(("required", name), {"required": [name]})

    def _parts(self, view: _View, tag: str | None) -> Iterator[_Node]:
        """Yield schemas that divide what the view admits: by type, by value, by tag."""
        if view.values is not None:
            # 1 and true are equal in Python, so that a constant 1 does not divide them.
            for text in {_loose(text): text for text in view.values}.values():
                yield self._const(text)
        elif len(view.types) > 1:
            for each in sorted(view.types):
                yield self._made.setdefault(("type", each), {"type": each})
        elif view.types == {"boolean"}:
            yield from (self._const("true"), self._const("false"))
        elif tag is not None:
            for text in _View(view.field(tag)).values or ():
                key = (f"tag {text}", tag)
                yield self._made.setdefault(key, {"properties": {tag: self._const(text)}})

    def _const(self, text: str) -> _Node:
        return self._made.setdefault(("const", text), {"const": json.loads(text)})

    def _alternatives(self, nodes: Iterable[_Node], root: _Node) -> list[_Nodes]:
        """Return schemas without references, allOf and unions: each value fits one of the tuples.

        They admit more where there are too many combinations, or a reference has no target.
        """
        found: list[_Nodes] = [()]
        for node in nodes:
            found = _product(found, self._expanded(node, root, frozenset()))
        return [unique for each in found if not _View(unique := _unique(each)).is_empty]

    def _expanded(self, node: _Node, root: _Node, seen: frozenset[str]) -> list[_Nodes]:
        if _is_nothing(node):
            return []
        flat = self._flat(node)
        found: list[_Nodes] = [(flat,)] if flat else [()]
        for part in node.get("allOf", ()):
            found = _product(found, self._expanded(_node(part), root, seen))
        if "$ref" in node:
            target = None if node["$ref"] in seen else _resolved(node["$ref"], root)
            inner: list[_Nodes] = [(_VAGUE,)]
            if target is not None:
                inner = self._expanded(target, root, seen | {node["$ref"]})
            found = _product(found, inner)
        for key in ("anyOf", "oneOf"):
            if key in node:
                tag = _tag_of(node) if key == "oneOf" else None
                options: list[_Nodes] = []
                for branch in node[key]:
                    options += self._expanded(_node(branch), root, seen)
                if tag is not None:
                    options = [(*each, self._make_required(tag)) for each in options]
                found = _product(found, options)
        return found

    def _flat(self, node: _Node) -> _Node:
        """Return a schema's own keywords, always the same object for the same schema."""
        if not any(key in node for key in ("$ref", "allOf", "anyOf", "oneOf")):
            return node
        flat = self._flat_nodes.get(id(node))
        if flat is None:
            flat = {
                key: value
                for key, value in node.items()
                if key not in ("$ref", "allOf", "anyOf", "oneOf") and key not in _ANNOTATIONS
            }
            if "oneOf" in node and _tag_of(node) is None:
                flat[_ONE_OF] = node["oneOf"]
            self._flat_nodes[id(node)] = flat
        return flat

    def _has_same(self, view: _View, key: str, value: Any) -> bool:
        """Return whether a schema of the view has an equivalent value for this keyword."""
        return any(self._is_same_value(node.get(key, _MISSING), value) for node in view.nodes)

    def _is_same(self, before: _Node, after: _Node) -> bool:
        text = self._text_of(after)
        return text == "{}" or (self._text_of(before) == text and self._leads_to_same(text))

    def _is_same_value(self, before: Any, after: Any) -> bool:
        """Return whether two values of a keyword require the same."""
        if before is _MISSING or after is _MISSING:
            return before is after
        text = _canonical(after)
        return _canonical(before) == text and self._leads_to_same(text)

    def _leads_to_same(self, text: str) -> bool:
        """Return whether every reference in a schema's text has the same target on both sides."""
        return self._before is self._after or all(
            name in self._same_definitions for name in _REFERENCES.findall(text)
        )

    def _text_of(self, node: _Node) -> str:
        text = self._texts.get(id(node))
        if text is None:
            text = self._texts[id(node)] = _canonical(node)
        return text

    def _find_same_definitions(self) -> set[str]:
        """Return the references whose targets require the same on both sides."""
        texts: dict[str, str] = {}
        waiting, seen = [_WHOLE], {_WHOLE}
        while waiting:
            name = waiting.pop()
            old = _resolved(json.loads(name), self._before)
            new = _resolved(json.loads(name), self._after)
            # A target outside both documents is the same for both.
            text = _canonical(old)
            if text == _canonical(new):
                texts[name] = text
            further = set(_REFERENCES.findall(text)) - seen
            waiting += further
            seen |= further
        users: dict[str, list[str]] = {}
        for name, text in texts.items():
            for each in _REFERENCES.findall(text):
                users.setdefault(each, []).append(name)
        differ = [each for each in users if each not in texts]
        while differ:
            for name in users.get(differ.pop(), ()):
                if texts.pop(name, None) is not None:
                    differ.append(name)
        return set(texts)


class _Pair(NamedTuple):
    """The identities of the schemas that are compared."""

    before: frozenset[int]
    after: int


class _View:
    """What several schemas without unions admit together: at least that, and perhaps more."""

    def __init__(self, nodes: Iterable[_Node]) -> None:
        self.nodes: _Nodes = tuple(nodes)
        types = _ALL_TYPES
        values: dict[str, None] | None = None
        for node in self.nodes:
            types &= _types_of(node)
            given = _values_of(node)
            if given is not None:
                if values is None:
                    values = dict.fromkeys(given)
                else:
                    loose = {_loose(text) for text in given}
                    values = {text: None for text in values if _loose(text) in loose}
        if values is not None:
            values = {text: None for text in values if _types_of_value(text) & types}
            types &= frozenset[str]().union(*(_types_of_value(text) for text in values))
        self.types: frozenset[str] = types
        self.values: tuple[str, ...] | None = None if values is None else tuple(values)

    @property
    def is_empty(self) -> bool:
        """Whether no value is admitted."""
        return not self.types

    @property
    def is_exact(self) -> bool:
        """Whether the view admits no more than its schemas, so that differences are certain."""
        holds_parts = self.values is not None and any(text[0] in "[{" for text in self.values)
        return _VAGUE not in self.nodes and not holds_parts

    @property
    def has_numeric_values(self) -> bool:
        """Whether a constant is a number or a boolean: Pydantic takes 1, 1.0 and true as equal."""
        return any(_loose(text)[0] == "number" for text in self.values or ())

    @property
    def loose_types(self) -> frozenset[str]:
        """The types. If one is a number or boolean, all number and boolean types are included."""
        return self.types | _LOOSE_TYPES if self.types & _LOOSE_TYPES else self.types

    @cached_property
    def words(self) -> str:
        if self.values is not None:
            return _values_words(self.values)
        words = _types_words(self.types)
        formats = self.all("format")
        return f"{words} (format {formats[0]})" if formats and words == "string" else words

    def all(self, key: str) -> list[Any]:
        """Return what the schemas have under a keyword."""
        return [node[key] for node in self.nodes if key in node]

    def numbers(self, key: str) -> list[float]:
        return [value for value in self.all(key) if _is_number(value)]

    def any_true(self, key: str) -> bool:
        return any(value is True for value in self.all(key))

    @cached_property
    def required(self) -> frozenset[str]:
        """The fields that are always present."""
        return frozenset(name for names in self.all("required") for name in names)

    @cached_property
    def names(self) -> dict[str, None]:
        """The fields that a schema names and that no schema forbids."""
        named = [name for properties in self.all("properties") for name in properties]
        return {
            name: None
            for name in dict.fromkeys(named)
            if not any(map(_is_nothing, self.field(name)))
        }

    @property
    def is_closed(self) -> bool:
        """Whether only named fields are admitted."""
        return any(
            node.get("additionalProperties") is False and not node.get("patternProperties")
            for node in self.nodes
        )

    def field(self, name: str) -> _Nodes:
        return _unique(
            demand for node in self.nodes for demand in _property_of(node, name, maybe=False)
        )

    def entries(self, pattern: str | None, others: Iterable[str]) -> list[_Nodes]:
        """Return the alternatives of an entry that no schema names.

        Its name matches `pattern`; None: it matches none of `others`.
        """
        found: list[_Nodes] = [()]
        for node in self.nodes:
            patterns = node.get("patternProperties", {})
            rest = _node(node.get("additionalProperties", True))
            if pattern is not None and pattern in patterns:
                options = [_node(patterns[pattern])]
            elif pattern is None:
                unlike = [_node(patterns[each]) for each in patterns if each not in others]
                options = [*unlike, rest]
            else:
                options = [*map(_node, patterns.values()), rest]
            found = _product(found, [(option,) for option in options])
        return [_unique(each) for each in found]

    def items(self, index: int) -> _Nodes:
        return _unique(_item_of(node, index) for node in self.nodes)

    def excludes(self, other: _View) -> bool:
        """Return whether types and constants show that no value is admitted by both."""
        if self.values is not None and other.values is not None:
            mine = {_loose(text) for text in self.values}
            return mine.isdisjoint(_loose(text) for text in other.values)
        if self.has_numeric_values or other.has_numeric_values:
            # Pydantic's constants also admit what is equal to them.
            return not (self.loose_types & other.loose_types)
        if not self.types & other.types:
            return True
        if self.types & other.types != {"object"}:
            return False
        for name in self.required | other.required:
            one, two = _View(self.field(name)), _View(other.field(name))
            if one.values is not None and two.values is not None and one.excludes(two):
                return True
        return False


def _refused_types(view: _View, after: _Node) -> Iterator[Difference]:
    types = _types_of(after)
    refused = view.types - types
    if refused:
        now = _types_words(types)
        is_fraction = refused == {"fraction"}
        what = "A number such as 1.5" if is_fraction else f"A value of type {_types_words(refused)}"
        is_certain = not view.has_numeric_values
        yield _difference(view, view.words, now, f"{what} is refused.", is_certain)
    elif view.has_numeric_values and _values_of(after) is None:
        # Pydantic compares constants as Python does, for which 1, 1.0 and true are equal.
        equal = {
            kind
            for text in view.values or ()
            if _loose(text)[0] == "number"
            for kind in ("integer", "fraction", "boolean")
            if kind != "boolean" or _loose(text)[1] in (0, 1)
        }
        if not equal <= types:
            reason = "A constant also admits what is equal to it, such as 1.0 and true for 1."
            yield Difference("", view.words, _types_words(types), reason, False)


def _refused_values(view: _View, after: _Node) -> Iterator[Difference]:
    allowed = _values_of(after)
    if allowed is None:
        return
    now = _values_words(allowed)
    values = view.values
    if values is None and view.types <= {"boolean", "null"}:
        values = (("true", "false") if "boolean" in view.types else ()) + (
            ("null",) if "null" in view.types else ()
        )
    if values is None:
        if view.types & _types_of(after):
            yield _difference(view, view.words, now, "Other values are refused.", True)
        return
    loose = {_loose(text) for text in allowed}
    refused = [text for text in values if text not in set(allowed)]
    if refused:
        is_certain = any(_loose(text) not in loose for text in refused)
        reason = f"{_sentence(_values_words(refused))} is refused."
        yield _difference(view, view.words, now, reason, is_certain)


def _refused_numbers(view: _View, after: _Node) -> Iterator[Difference]:
    whole = "fraction" not in view.types and "string" not in view.types
    is_text = "string" in view.types
    steps = view.numbers("multipleOf")
    values = [Fraction(v) for v in map(_number_of, view.values or ()) if v is not None]
    for sign, names in ((1, _LOWER), (-1, _UPPER)):
        new = _bound((after,), names, sign, whole)
        if new is None:
            continue
        old = _bound(view.nodes, names, sign, whole)
        if view.values is not None and not is_text:
            broken = any(not new.admits(value, sign) for value in values)
        else:
            broken = old is None or old.is_wider(new, sign)
        # Large integers are rounded where they become floats.
        rounded = whole and "fraction" in _types_of(after) and abs(new.value) >= _MAX_SAFE_INT
        if broken or rounded:
            was = "any number" if old is None else old.words(sign)
            was = was if view.values is None else view.words
            reason = f"A number that is not {new.words(sign)} is refused."
            is_certain = broken and not steps
            yield _difference(view, was, new.words(sign), reason, is_certain)
    step = after.get("multipleOf")
    if _is_number(step) and step > 0:
        new_step = _exact(step)
        fits = any((_exact(each) / new_step).denominator == 1 for each in steps if each)
        if whole and (1 / new_step).denominator == 1:
            fits = True
        if not fits:
            was = f"a multiple of {steps[0]}" if steps else "any number"
            reason = f"A number that is not a multiple of {step} is refused."
            is_certain = view.values is None and not steps
            yield _difference(view, was, f"a multiple of {step}", reason, is_certain)


def _refused_strings(view: _View, after: _Node) -> Iterator[Difference]:
    formats = [str(each) for each in view.all("format")]
    patterns = view.all("pattern")
    values = None if view.values is None else [json.loads(t) for t in view.values if t[0] == '"']
    normalized = view.all("normalized") or [None]
    plain = values is None and not patterns and normalized == [None]
    now = after.get("format")
    if now is not None and now not in _WIDEST and not any(_fits_format(f, now) for f in formats):
        was = f"format {formats[0]}" if formats else view.words
        certain = plain and now in _FAMILIES
        known = [_FAMILIES.get(f, _FAMILIES.get(now)) for f in formats if f not in _WIDEST]
        certain = certain and _FAMILIES[now] not in known
        reason = f"Text that is not of the format {now} is refused."
        yield _difference(view, was, f"format {now}", reason, certain)
    # Bytes and URLs are measured after they are read, and some text after it is normalized.
    alike = {f for f in formats if f not in _TEXT} == ({now} - _TEXT if now else set())
    if any(_text(each) != _text(after.get("normalized")) for each in normalized):
        alike, patterns = False, []
    lengths = [float(len(value)) for value in values] if values is not None else None
    shortest = _greatest(view.numbers("minLength"), 0)
    longest = _least(view.numbers("maxLength"))
    if lengths:
        shortest, longest = min(lengths), max(lengths)
    if not alike:
        shortest, longest = 0, math.inf
    yield from _refused_sizes(
        view,
        after,
        ("minLength", "maxLength"),
        (shortest, longest),
        "character",
        alike and (bool(lengths) or (plain and not set(formats) - _TEXT)),
        alike,
    )
    pattern = after.get("pattern")
    if pattern is not None and pattern not in patterns:
        was = f"pattern {shortened(patterns[0])}" if patterns else view.words
        certain = plain and not formats and _refuses_some(pattern, shortest, longest)
        reason = "Text that does not match the pattern is refused."
        yield _difference(view, was, f"pattern {shortened(pattern)}", reason, certain)
    if now == "decimal":
        yield from _refused_digits(view, after, plain)


def _refused_digits(view: _View, after: _Node, plain: bool) -> Iterator[Difference]:
    """Yield where a decimal may have more digits, before or after its point, than are admitted."""
    digits, places = _least(view.numbers("maxDigits")), _least(view.numbers("decimalPlaces"))
    new_digits = _least(_View((after,)).numbers("maxDigits"))
    new_places = _least(_View((after,)).numbers("decimalPlaces"))
    old = (digits, places, digits - places if places < math.inf else digits)
    new = (new_digits, new_places, new_digits - new_places if new_places < math.inf else math.inf)
    for was, now, what in zip(
        old, new, ("digits", "decimal places", "digits before the point"), strict=True
    ):
        if was > now:
            words = f"any number of {what}" if was == math.inf else f"at most {was:g} {what}"
            reason = f"A decimal with more {what} is refused."
            yield _difference(view, words, f"at most {now:g} {what}", reason, plain)


def _refused_sizes(
    view: _View,
    after: _Node,
    keys: tuple[str, str],
    sizes: tuple[float, float],
    unit: str,
    is_certain: bool,
    is_alike: bool = True,
) -> Iterator[Difference]:
    """Yield where a length, between two bounds before, may be less or more than `after` admits.

    Where the two sides measure lengths differently, `sizes` are not those that `view` states.
    """
    for key, size, word in zip(keys, sizes, ("least", "most"), strict=True):
        bound = after.get(key)
        if not _is_number(bound) or (size >= bound if word == "least" else size <= bound):
            continue
        stated = view.numbers(key)
        tightest = max(stated, default=0) if word == "least" else _least(stated)
        if view.values is not None:
            was = view.words
        elif is_alike and 0 < size < math.inf:
            was = f"at {word} {_count(size, unit)}"
        elif 0 < tightest < math.inf:
            was = f"at {word} {_count(tightest, unit)}"
        else:
            was = f"any number of {unit}s"
        reason = f"{'Fewer' if word == 'least' else 'More'} {unit}s are refused."
        if not is_alike:
            reason = f"The number of {unit}s is counted in another way, and is now bounded."
        yield _difference(view, was, f"at {word} {_count(bound, unit)}", reason, is_certain)


def _count(number: float, unit: str) -> str:
    return f"{number:g} {unit}{'' if number == 1 else 's'}"


class _Bound(NamedTuple):
    """A lower or upper bound of a number; the sign is 1 for a lower one and -1 for an upper one."""

    value: Fraction
    is_excluded: bool
    written: float

    def is_wider(self, other: _Bound, sign: int) -> bool:
        """Return whether this bound admits what the other refuses."""
        if self.value == other.value:
            return other.is_excluded and not self.is_excluded
        return sign * self.value < sign * other.value

    def admits(self, value: Fraction, sign: int) -> bool:
        """Return whether a value is within the bound."""
        return sign * value > sign * self.value or (value == self.value and not self.is_excluded)

    def words(self, sign: int) -> str:
        if self.is_excluded:
            return f"{'more' if sign == 1 else 'less'} than {self.written}"
        return f"at {'least' if sign == 1 else 'most'} {self.written}"


def _bound(nodes: _Nodes, keys: tuple[str, str], sign: int, whole: bool) -> _Bound | None:
    """Return the tightest bound. For whole numbers, more than 3 is at least 4."""
    tightest: _Bound | None = None
    for node in nodes:
        for key in keys:
            written = node.get(key)
            if not _is_number(written):
                continue
            value, excluded = Fraction(written), key.startswith("exclusive")
            if whole:
                up = math.floor(value) + 1 if excluded else math.ceil(value)
                down = math.ceil(value) - 1 if excluded else math.floor(value)
                value, excluded = Fraction(up if sign == 1 else down), False
                written = int(value)
            found = _Bound(value, excluded, written)
            if tightest is None or tightest.is_wider(found, sign):
                tightest = found
    return tightest


def _paired(before: _Node, after: _Node) -> Iterator[tuple[str, _Node, _Node]]:
    """Yield the schemas of the same field in both, with its path; each pair of schemas once."""
    waiting: list[tuple[str, Any, Any]] = [("", before, after)]
    seen: set[tuple[int, int]] = set()
    while waiting and len(seen) < MAX_COMPARISONS:
        path, given_old, given_new = waiting.pop()
        yield path, _node(given_old), _node(given_new)
        old, new = _followed(given_old, before), _followed(given_new, after)
        if (id(old), id(new)) in seen:
            continue
        seen.add((id(old), id(new)))
        below: list[tuple[str, Any, Any]] = []
        properties = new.get("properties", {})
        for name, inner in old.get("properties", {}).items():
            if name in properties:
                below.append((pointer(path, name), inner, properties[name]))
        for key in ("items", "additionalProperties"):
            if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
                below.append((f"{path}/*", old[key], new[key]))
        pairs = zip(old.get("prefixItems", ()), new.get("prefixItems", ()), strict=False)
        below += ((f"{path}/{index}", *pair) for index, pair in enumerate(pairs))
        for key in ("allOf", "anyOf", "oneOf"):
            for each in old.get(key, ()):
                likeness = _likeness(each, before)
                partner = (b for b in new.get(key, ()) if _likeness(b, after) == likeness)
                below += ((path, each, found) for found in list(partner)[:1])
        waiting += reversed(below)


def _likeness(branch: Any, root: _Node) -> object:
    """Return a key by which branches of two unions correspond: the tag or the type."""
    node = _followed(branch, root)
    constants = {
        name: _text(inner["const"])
        for name, inner in node.get("properties", {}).items()
        if isinstance(inner, Mapping) and "const" in inner
    }
    return (str(node.get("type")), str(constants), "" if constants else _node(branch).get("$ref"))


def _followed(node: Any, root: _Node) -> _Node:
    """Return the schema at the end of its references."""
    found = _node(node)
    for _ in range(MAX_DEPTH):
        target = _resolved(found["$ref"], root) if "$ref" in found else None
        if target is None:
            break
        found = target
    return found


def _resolved(reference: Any, root: _Node) -> _Node | None:
    """Return the target of a reference within the document."""
    if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
        return None
    found: Any = root
    for name in names_in(reference):
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return _node(found) if isinstance(found, Mapping | bool) else None


def _node(schema: Any) -> _Node:
    if schema is True:
        return _NO_DEMANDS
    if schema is False:
        return _NOTHING
    return schema if isinstance(schema, Mapping) else _VAGUE


def _is_nothing(node: _Node) -> bool:
    return "not" in node and node["not"] in (True, {})


def _tag_of(node: _Node) -> str | None:
    """Return the field that says which branch of a discriminated union it is."""
    discriminator = node.get("discriminator")
    name = discriminator.get("propertyName") if isinstance(discriminator, Mapping) else None
    return name if isinstance(name, str) else None


def _property_of(node: _Node, name: str, *, maybe: bool) -> list[_Node]:
    """Return what a schema requires of a field. `maybe` includes what a pattern may require."""
    found = []
    properties = node.get("properties", {})
    is_other = name not in properties
    if not is_other:
        found.append(_node(properties[name]))
    for pattern, demand in node.get("patternProperties", {}).items():
        matches = _matches(pattern, name)
        if matches or (matches is None and maybe):
            found.append(_node(demand))
        is_other = is_other and (matches is False or (matches is None and maybe))
    if is_other and "additionalProperties" in node:
        found.append(_node(node["additionalProperties"]))
    return found


def _item_of(node: _Node, index: int) -> _Node:
    prefix = node.get("prefixItems", ())
    return _node(prefix[index] if index < len(prefix) else node.get("items", True))


def _product(left: list[_Nodes], right: list[_Nodes]) -> list[_Nodes]:
    """Return every combination. If there are too many, return fewer that admit more."""
    if len(left) > 1 and len(right) > 1 and len(left) * len(right) > MAX_ALTERNATIVES:
        return [(*each, _VAGUE) for each in left]
    return [a + b for a in left for b in right]


def _unique(nodes: Iterable[_Node]) -> _Nodes:
    return tuple({id(node): node for node in nodes if node is not _NO_DEMANDS}.values())


def _types_of(node: _Node) -> frozenset[str]:
    given = node.get("type")
    if given is None:
        return _ALL_TYPES
    names = [given] if isinstance(given, str) else given
    return frozenset(each for name in names for each in (_NUMBERS if name == "number" else (name,)))


def _values_of(node: _Node) -> list[str] | None:
    """Return the constants of a schema, as JSON text. None: it has none."""
    values = None
    if "enum" in node:
        values = [_text(value) for value in node["enum"]]
    if "const" in node:
        constant = _text(node["const"])
        values = [constant] if values is None or constant in values else []
    return values


def _types_of_value(text: str) -> frozenset[str]:
    value = json.loads(text)
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer"})
        case float():
            # From an enum of floats, where JSON Schema would count 1.0 as an integer.
            return frozenset({"fraction"})
        case str():
            return frozenset({"string"})
        case list():
            return frozenset({"array"})
    return frozenset({"object"})


def _number_of(text: str) -> int | float | None:
    value = json.loads(text)
    return value if _is_number(value) else None


def _loose(text: str) -> tuple[str, Any]:
    """Return the same key for constants that are equal in Python, such as 1, 1.0 and true."""
    value = json.loads(text)
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return "number", Fraction(value)
    return "text", text


def _fits_format(before: str, after: str) -> bool:
    return before == after or _WIDER.get(before) == after


def _refuses_some(pattern: Any, shortest: float, longest: float) -> bool:
    """Return whether a pattern refuses any of a few sample texts of this length."""
    lengths = [int(n) for n in (shortest, 1, longest) if shortest <= n <= longest and n < 999]
    samples = [character * length for character in "a0 \x01" for length in lengths]
    return any(_matches(pattern, sample) is False for sample in samples)


def _matches(pattern: Any, text: str) -> bool | None:
    """Return whether a pattern is found in a text. None: Python cannot use the pattern."""
    try:
        return re.search(pattern, text) is not None
    except (re.error, TypeError, OverflowError, RecursionError):
        return None


def _exact(number: float) -> Fraction:
    """Return the number as it is written: 0.1 is a tenth."""
    return Fraction(str(number))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _least(numbers: Iterable[float]) -> float:
    return min(numbers, default=math.inf)


def _greatest(numbers: Iterable[float], least: float) -> float:
    return max([*numbers, least])


def _difference(view: _View, before: str, after: str, reason: str, certain: bool) -> Difference:
    return Difference("", before, after, reason, certain and view.is_exact)


def _uncertain(reason: str, path: str = "") -> Difference:
    return Difference(path, "unknown", "unknown", reason, False)


def _below(token: str, found: Iterable[Difference]) -> Iterator[Difference]:
    start = pointer("", token)
    return (replace(each, path=start + each.path) for each in found)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _canonical(value: Any) -> str:
    """Return the JSON text of a schema, or of a keyword's value, without annotations."""
    return _text(_demands(value))


def _demands(schema: Any) -> Any:
    if isinstance(schema, list | tuple):
        return [_demands(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: _demands_of_keyword(key, value)
        for key, value in schema.items()
        if key not in _ANNOTATIONS and not key.startswith("x-")
    }


def _demands_of_keyword(key: str, value: Any) -> Any:
    if key in ("const", "enum"):
        return value
    if key in _NAMED and isinstance(value, Mapping):
        return {name: _demands(inner) for name, inner in value.items()}
    if key == "required" and isinstance(value, list):
        return sorted(map(str, value))
    return _demands(value)


def _keyword_words(key: str, value: Any) -> str:
    return f"no {key}" if value is _MISSING else f"{key} {shortened(_demands(value))}"


def _values_words(values: Iterable[str]) -> str:
    texts = [shortened(json.loads(text)) for text in values]
    listed = ", ".join(texts[:10]) + (", …" if len(texts) > 10 else "")
    return listed if len(texts) == 1 else f"one of {listed}"


def _types_words(types: frozenset[str]) -> str:
    if types == _ALL_TYPES:
        return "any value"
    names = set(types)
    if names >= _NUMBERS:
        names = (names - _NUMBERS) | {"number"}
    order = ("string", "integer", "fraction", "number", "boolean", "array", "object", "null")
    known = [name for name in order if name in names] + sorted(names - set(order))
    return alternatives("number with a fraction" if n == "fraction" else n for n in known)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


_MISSING: Final = object()
_NO_DEMANDS: Final[_Node] = {}
_NOTHING: Final[_Node] = {"not": {}}
_STRING: Final[_Node] = {"type": "string"}
_VAGUE: Final[_Node] = {"$comment": "Admits more than the schema it stands for."}
_ONE_OF: Final = " oneOf"
"""The key under which a schema without unions keeps its oneOf, for comparison only."""

_LOWER: Final = ("minimum", "exclusiveMinimum")
_UPPER: Final = ("maximum", "exclusiveMaximum")
_NUMBERS: Final = frozenset({"integer", "fraction"})
"""JSON Schema's number in two parts: those without and with a fraction in their JSON text."""

_LOOSE_TYPES: Final = _NUMBERS | {"boolean"}
_ALL_TYPES: Final = _NUMBERS | {"null", "boolean", "string", "array", "object"}
_WHOLE: Final = '"#"'
_REFERENCES: Final = re.compile(r'"\$ref":("(?:[^"\\]|\\.)*")')

_ANNOTATIONS: Final = frozenset(
    {
        *("title", "description", "examples", "example", "default", "deprecated"),
        *("readOnly", "writeOnly", "$comment", "$schema", "$id", "$anchor", "$vocabulary"),
        *("$defs", "definitions"),
    }
)
_NAMED: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
"""Keywords whose keys are names."""

_COMPARED: Final = frozenset(
    {
        *("$ref", "allOf", "anyOf", "oneOf", "discriminator", "type", "const", "enum"),
        *("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "pattern", "format", "normalized"),
        *("maxDigits", "decimalPlaces"),
        *("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
        *("properties", "required", "additionalProperties", "patternProperties"),
        *("propertyNames", "minProperties", "maxProperties"),
        # Compared together with the keyword that they belong to.
        *("then", "else", "minContains", "maxContains"),
    }
)
_GROUPS: Final = {
    "if": ("if", "then", "else"),
    "contains": ("contains", "minContains", "maxContains"),
}
_NOT_LOCAL: Final = ("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef")
_READ: Final = ("decimal", "integer", "number")
"""Formats of text that is read as a number, and can have a number's bounds."""

_WIDEST: Final = frozenset({"password", "binary"})
"""Formats that admit any text."""

_TEXT: Final = frozenset({"password"})
"""Formats whose values are as long as their text."""

_WIDER: Final = {
    **{f"uuid{version}": "uuid" for version in range(1, 9)},
    **{f"ipv{version}": "ipvanyaddress" for version in (4, 6)},
    **{f"ipv{version}network": "ipvanynetwork" for version in (4, 6)},
    **{f"ipv{version}interface": "ipvanyinterface" for version in (4, 6)},
    "file-path": "path",
    "directory-path": "path",
}
_FAMILIES: Final = {
    **dict.fromkeys(("uuid", *(f"uuid{version}" for version in range(1, 9))), "uuid"),
    **dict.fromkeys(("ipv4", "ipv6", "ipvanyaddress"), "ip"),
    **dict.fromkeys(("date", "date-time", "time", "duration"), "time"),
    **{name: name for name in ("decimal", "email", "uri", "integer", "number", "boolean")},
}
"""Formats that refuse some text, by family. Formats of one family may admit the same text."""
