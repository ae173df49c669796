"""What a change of the GraphQL schema means for clients of the older one."""

from __future__ import annotations

from pathlib import Path

import pytest

import job_registry_api.graphql
from job_registry_api.graphql.schema_changes import ClientChange, client_changes

OLD = '''
directive @mark(level: Int = 1, name: String) repeatable on FIELD | QUERY

interface Node { id: ID! }
interface Named { name: String }

type Query {
  job(id: ID!, first: Int = 10, last: Int! = 5): Job
  jobs: [Job]
  result: Result
}

type Mutation { start: Boolean }

"""A job."""
type Job implements Node {
  id: ID!
  status: Status!
  title: String
  old: Int @deprecated(reason: "Use title.")
}

type Failed { reason: String }
type Lost { reason: String }

union Result = Job | Failed

enum Status { QUEUED DONE }

input JobInput {
  a: Int
  b: String = "x"
  c: Int! = 3
}

input Choice @oneOf { one: Int, two: Int }
input Free { one: Int, two: Int }

scalar Moment @specifiedBy(url: "https://example.com/1")
scalar Other
'''


def changed(old: str, new: str) -> list[tuple[str, str]]:
    """Return the kind and the path of what a replacement in the schema changes."""
    assert old in OLD
    return [(each.kind, each.path) for each in client_changes(OLD, OLD.replace(old, new, 1))]


BREAKING = [
    ("  title: String\n", "", "Job.title"),
    ("title: String", "title: Int", "Job.title"),
    ("status: Status!", "status: Status", "Job.status"),
    ("scalar Other", "", "Other"),
    ("scalar Other", "enum Other { A }", "Other"),
    ("= Job | Failed", "= Job", "Result"),
    ("QUEUED DONE", "QUEUED", "Status.DONE"),
    ("  a: Int\n", "  a: Int\n  d: Int!\n", "JobInput.d"),
    ("  a: Int\n", "", "JobInput.a"),
    ("  a: Int\n", "  a: Int!\n", "JobInput.a"),
    ("c: Int! = 3", "c: Int!", "JobInput.c"),
    ("last: Int! = 5", "last: Int!", "Query.job(last:)"),
    (", last: Int! = 5", "", "Query.job(last:)"),
    ("first: Int = 10", "first: String", "Query.job(first:)"),
    ("last: Int! = 5", "last: Int! = 5, n: Int!", "Query.job(n:)"),
    ("Job implements Node", "Job", "Job"),
    ("input Free {", "input Free @oneOf {", "Free"),
    ("type Mutation { start: Boolean }", "", "Mutation"),
    (" repeatable", "", "@mark"),
    (" | QUERY", "", "@mark"),
    (", name: String)", ")", "@mark(name:)"),
    ("(level: Int = 1", "(level: Int = 1, n: Int!", "@mark(n:)"),
    ("directive @mark(level: Int = 1, name: String) repeatable on FIELD | QUERY", "", "@mark"),
]


@pytest.mark.parametrize(("old", "new", "path"), BREAKING)
def test_what_a_client_may_use_and_is_gone_or_required_is_breaking(
    old: str, new: str, path: str
) -> None:
    found = changed(old, new)
    assert ("breaking", path) in found
    assert {kind for kind, _ in found} == {"breaking"}


DANGEROUS = [
    ("QUEUED DONE", "QUEUED DONE LOST", "Status.LOST"),
    ("= Job | Failed", "= Job | Failed | Lost", "Result"),
    ("  a: Int\n", "  a: Int\n  d: Int\n", "JobInput.d"),
    ('b: String = "x"', 'b: String = "y"', "JobInput.b"),
    ('b: String = "x"', "b: String", "JobInput.b"),
    ("first: Int = 10", "first: Int = 20", "Query.job(first:)"),
    ("first: Int = 10", "first: Int = 10, n: Int", "Query.job(n:)"),
    ("(level: Int = 1", "(level: Int = 2", "@mark(level:)"),
    ("Job implements Node {", "Job implements Node & Named { name: String", "Job"),
    ("https://example.com/1", "https://example.com/2", "Moment"),
    (' @specifiedBy(url: "https://example.com/1")', "", "Moment"),
]


@pytest.mark.parametrize(("old", "new", "path"), DANGEROUS)
def test_what_stays_valid_and_may_behave_differently_is_dangerous(
    old: str, new: str, path: str
) -> None:
    found = changed(old, new)
    assert ("dangerous", path) in found
    assert "breaking" not in {kind for kind, _ in found}


SAFE = [
    ("scalar Other", "scalar Other scalar Third", "Third"),
    ("title: String", "title: String!", "Job.title"),
    ("title: String", "title: String, more: Int", "Job.more"),
    ("title: String", 'title: String @deprecated(reason: "Use id.")', "Job.title"),
    (' @deprecated(reason: "Use title.")', "", "Job.old"),
    ('"Use title."', '"Use id."', "Job.old"),
    ("QUEUED DONE", "QUEUED DONE @deprecated", "Status.DONE"),
    ("  a: Int\n", "  a: Int @deprecated\n", "JobInput.a"),
    ("first: Int = 10", "first: Int = 10 @deprecated", "Query.job(first:)"),
    ("id: ID!, first", "id: ID, first", "Query.job(id:)"),
    ("  a: Int\n", "  a: Int = 3\n", "JobInput.a"),
    ("one: Int, two: Int }", "one: Int, two: Int, three: Int }", "Choice.three"),
    ("input Choice @oneOf", "input Choice", "Choice"),
    ("type Failed", "type Subscription { n: Int }\ntype Failed", "Subscription"),
    ("QUERY", "QUERY | MUTATION", "@mark"),
    (", name: String)", ", name: String, n: Int)", "@mark(n:)"),
    ("directive @mark", "directive @other on FIELD directive @mark", "@other"),
    ("title: String", "title: String, share: Float", "Job.share"),
]


@pytest.mark.parametrize(("old", "new", "path"), SAFE)
def test_what_no_client_notices_is_safe(old: str, new: str, path: str) -> None:
    found = changed(old, new)
    assert ("safe", path) in found
    assert {kind for kind, _ in found} == {"safe"}


def test_descriptions_and_order_are_no_change() -> None:
    assert changed('"""A job."""', '"""Another text."""') == []
    assert changed("QUEUED DONE", "DONE QUEUED") == []
    assert client_changes(OLD, OLD) == ()


def test_a_root_type_of_another_name_is_breaking() -> None:
    before = "schema { query: A } type A { n: Int } type B { n: Int }"
    after = "schema { query: B } type A { n: Int } type B { n: Int }"
    assert client_changes(before, after) == (
        ClientChange("breaking", "B", "The root type of query changed from A to B."),
    )


def test_a_scalar_of_graphql_itself_that_is_no_longer_used_is_no_change() -> None:
    before = "type Query { n: Int, share: Float }"
    after = "type Query { n: Int }"
    assert [each.path for each in client_changes(before, after)] == ["Query.share"]


def test_a_change_has_a_sentence_and_breaking_ones_come_first() -> None:
    after = OLD.replace("QUEUED DONE", "QUEUED LOST").replace("title: String", "more: Int")
    assert client_changes(OLD, after) == (
        ClientChange("breaking", "Job.title", "Field Job.title was removed."),
        ClientChange("breaking", "Status.DONE", "Enum value Status.DONE was removed."),
        ClientChange("dangerous", "Status.LOST", "Enum value Status.LOST was added."),
        ClientChange("safe", "Job.more", "Field Job.more was added."),
    )


def test_two_changes_of_one_field_are_both_named() -> None:
    found = changed("title: String", 'title: String! @deprecated(reason: "Use id.")')
    assert found == [("safe", "Job.title"), ("safe", "Job.title")]


@pytest.mark.parametrize("sdl", ["type Query {", "type Query { a: Nowhere }", ""])
def test_an_invalid_schema_is_refused(sdl: str) -> None:
    with pytest.raises(ValueError, match="The newer GraphQL schema is not valid: "):
        client_changes(OLD, sdl)


def test_the_schema_of_this_version_has_no_change_against_itself() -> None:
    folder = Path(next(iter(job_registry_api.graphql.__path__)))
    sdl = (folder / "schema.graphql").read_text()
    assert client_changes(sdl, sdl) == ()
