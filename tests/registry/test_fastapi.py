"""A payload as a body and as a response in FastAPI: it takes exactly what `enqueueJob` takes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, cast
from uuid import UUID

import httpx
import pytest
from fastapi import Body, FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from job_registry import JobRegistry, JobType, Payload, PayloadInvalid


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Line(Payload):
    article_id: UUID
    unit_price: Decimal = Decimal(1)


class Card(Payload):
    kind: Literal["card"]
    valid_until: date


class Cash(Payload):
    kind: Literal["cash"]


class Mail(Payload):
    """A mail with one field of each kind that JSON has as a string."""

    send_at: datetime
    day: date | None = None
    hour: time | None = None
    pause: timedelta | None = None
    ident: UUID | None = None
    color: Color | None = None
    amount: Annotated[Decimal, Field(gt=0)] | None = None
    copies: int = 1
    tags: set[str] | None = None
    lines: list[Line] | None = None
    paid: Annotated[Card | Cash, Field(discriminator="kind")] | None = None
    answers: Mail | None = None


MAIL = JobType(name="mail", payload=Mail)
REGISTRY = JobRegistry([MAIL])
GOOD: dict[str, Any] = {"sendAt": "2030-01-31T12:00:00Z"}
UUID_TEXT = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"
FULL: dict[str, Any] = {
    **GOOD,
    "day": "2030-01-31",
    "hour": "12:00:00Z",
    "pause": "PT30S",
    "ident": UUID_TEXT,
    "color": "red",
    "amount": "12.50",
    "copies": 2,
    "tags": ["a", "b"],
    "lines": [{"articleId": UUID_TEXT, "unitPrice": "0.10"}],
    "paid": {"kind": "card", "validUntil": "2031-01-01"},
    "answers": {**GOOD, "color": "blue"},
}
VALUES: list[Any] = [None, True, 1, 2.0, 1.5, 2**70, "1", "2030", "x", "a\0", "", "red", "1e3", []]
CASES: list[Any] = [
    GOOD,
    FULL,
    {},
    "text",
    7,
    [],
    None,
    {"send_at": GOOD["sendAt"]},
    {**GOOD, "unknown": 1},
    {**GOOD, "lines": [{"article_id": UUID_TEXT}]},
    {**GOOD, "lines": [{"articleId": UUID_TEXT, "unitPrice": 0.1}]},
    {**GOOD, "lines": [{"articleId": UUID_TEXT, "unknown": 1}]},
    {**GOOD, "paid": {"kind": "cash", "validUntil": "2031-01-01"}},
    {**GOOD, "paid": {"kind": "coins"}},
    {**GOOD, "answers": {**GOOD, "amount": 1}},
    *({**FULL, name: value} for name in FULL for value in VALUES),
]


class Order(BaseModel):
    """A model that is not a payload. A payload in it is as strict as elsewhere."""

    mail: Mail
    line: Line | None = None
    note: str = ""


def app() -> FastAPI:
    api = FastAPI()

    @api.post("/mail")
    def take_mail(mail: Mail) -> Mail:
        return mail

    @api.post("/order")
    def take_order(order: Order) -> Order:
        return order

    @api.post("/mails")
    def take_mails(mails: list[Mail]) -> list[Mail]:
        return mails

    @api.post("/named")
    def take_named(mail: Annotated[Mail, Body(embed=True)], line: Line) -> dict[str, Mail]:
        return {"mail": mail}

    @api.post("/dict", response_model=Mail)
    def return_a_dict(body: dict[str, Any]) -> dict[str, Any]:
        return body

    @api.post("/python", response_model=Mail)
    def return_python_values(mail: Mail) -> dict[str, Any]:
        return mail.model_dump()

    return api


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app())
    async with httpx.AsyncClient(transport=transport, base_url="http://shop.test") as client:
        yield client


async def post(client: httpx.AsyncClient, path: str, value: Any) -> httpx.Response:
    return await client.post(
        path, content=json.dumps(value), headers={"Content-Type": "application/json"}
    )


def is_admitted(payload: Any) -> bool:
    try:
        REGISTRY.admit("mail", payload)
    except PayloadInvalid:
        return False
    return True


async def test_a_body_is_accepted_exactly_where_it_is_accepted_as_a_job(
    client: httpx.AsyncClient,
) -> None:
    accepted = 0
    for case in CASES:
        answers = {
            "/mail": await post(client, "/mail", case),
            "/order": await post(client, "/order", {"mail": case}),
            "/mails": await post(client, "/mails", [GOOD, case]),
            "/named": await post(
                client, "/named", {"mail": case, "line": {"articleId": UUID_TEXT}}
            ),
        }
        expected = 200 if is_admitted(case) else 422
        assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(
            answers, expected
        ), case
        accepted += expected == 200
    assert accepted >= 15


async def test_what_a_handler_gets_is_what_the_worker_gets(client: httpx.AsyncClient) -> None:
    parsed = REGISTRY.validate("mail", FULL)
    assert TypeAdapter(list[Mail]).validate_python([FULL]) == [parsed]
    assert (await post(client, "/mail", FULL)).json() == json.loads(parsed.model_dump_json())


async def test_a_response_has_the_names_and_the_strings_of_json(client: httpx.AsyncClient) -> None:
    for path, body in (("/mail", FULL), ("/dict", FULL), ("/python", FULL)):
        answer = await post(client, path, body)
        assert answer.status_code == 200
        assert {**answer.json(), "tags": sorted(answer.json()["tags"])} == {
            **FULL,
            "answers": answer.json()["answers"],
        }
    assert (await post(client, "/mails", [GOOD])).json()[0]["sendAt"] == GOOD["sendAt"]


async def test_a_fault_is_located_in_the_body(client: httpx.AsyncClient) -> None:
    async def faults(path: str, body: Any) -> list[tuple[list[Any], str]]:
        details = (await post(client, path, body)).json()["detail"]
        return [(each["loc"], each["type"]) for each in details]

    assert await faults("/mails", [{**GOOD, "lines": [{}]}]) == [
        (["body", 0, "lines", 0, "articleId"], "missing")
    ]
    assert await faults("/order", {"mail": {**GOOD, "answers": {"sendAt": "2030"}}}) == [
        (["body", "mail", "answers", "sendAt"], "datetime_parsing")
    ]
    assert await faults("/mail", {**GOOD, "copies": 2**70, "tags": ["a", "b\0"]}) == [
        (["body", "copies"], "integer_too_large"),
        (["body", "tags", 1], "invalid_text"),
    ]


@pytest.mark.parametrize("value", ["NaN", "[1e999]", '"\\ud800"', '{"\\ud800": 1}'])
async def test_what_no_json_can_hold_is_a_fault_of_the_body(
    client: httpx.AsyncClient, value: str
) -> None:
    body = '{"sendAt": "2030-01-31T12:00:00Z", "copies": ' + value + "}"
    answer = await client.post("/mail", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    (fault,) = answer.json()["detail"]
    assert (fault["type"] in ("not_finite", "invalid_text"), fault["loc"][:2]) == (
        True,
        ["body", "copies"],
    )


async def test_openapi_has_each_payload_once_with_its_camel_case_names(
    client: httpx.AsyncClient,
) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    bodies = ("Body_take_named_named_post", "HTTPValidationError", "ValidationError")
    assert {name.removesuffix("-Input").removesuffix("-Output") for name in schemas} - set(
        bodies
    ) == {"Card", "Cash", "Color", "Line", "Mail", "Order"}
    mail = schemas.get("Mail") or schemas["Mail-Input"]
    assert mail["required"] == ["sendAt"]
    assert mail["additionalProperties"] is False
    line = schemas.get("Line") or schemas["Line-Input"]
    assert set(line["properties"]) == {"articleId", "unitPrice"}
    assert line["properties"]["unitPrice"]["type"] == "string"


@settings(max_examples=100, deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from([*FULL, "send_at", "other"]),
        st.sampled_from(VALUES) | st.sampled_from([*FULL.values()]),
        max_size=3,
    ),
    inner=st.booleans(),
)
def test_a_part_of_a_type_accepts_what_a_job_accepts(changes: dict[str, Any], inner: bool) -> None:
    payload = {**FULL, "answers": {**GOOD, **changes}} if inner else {**FULL, **changes}
    try:
        parsed = TypeAdapter(dict[str, Mail]).validate_python({"a": payload})["a"]
    except ValidationError:
        assert not is_admitted(payload)
    else:
        assert parsed == REGISTRY.validate("mail", payload)
    try:
        Order.model_validate_json(json.dumps({"mail": payload}))
    except ValidationError:
        assert not is_admitted(payload)
    else:
        assert is_admitted(payload)


def test_an_instance_is_made_from_python_values_as_before() -> None:
    noon = datetime(2030, 1, 31, 12, tzinfo=UTC)
    mail = Mail(send_at=noon, lines=[Line(article_id=UUID(UUID_TEXT))])
    assert Mail.model_validate({"send_at": noon}) == Mail.model_validate({"sendAt": noon})
    assert Order(mail=mail).mail is mail
    assert Order.model_validate(Order(mail=mail).model_dump()).mail == mail
    texts: list[Any] = [{"send_at": GOOD["sendAt"]}, {"sendAt": GOOD["sendAt"]}]
    for text in texts:
        with pytest.raises(ValidationError):
            Mail(**text)
        with pytest.raises(ValidationError):
            Mail.model_validate(text)
    with pytest.raises(ValidationError):
        Mail(send_at=noon, copies=cast(Any, "1"))
    Mail.model_rebuild(force=True)
    assert Mail(send_at=noon).send_at == noon
    assert Mail.model_validate_json(json.dumps(FULL)) == REGISTRY.validate("mail", FULL)


class Tree(Payload):
    planted: date
    below: tuple[Tree, ...] = ()


class Garden(BaseModel):
    oldest: Tree | None = None
    trees: list[Tree] = []


def test_a_recursive_payload_at_two_places_is_read_as_json_at_both() -> None:
    tree = {"planted": "2030-01-31", "below": [{"planted": "2031-01-31"}]}
    parsed = Tree.model_validate_json(json.dumps(tree))
    garden = Garden.model_validate({"oldest": tree, "trees": [tree]})
    assert garden == Garden(oldest=parsed, trees=[parsed])
    assert Garden.model_validate_json(json.dumps({"oldest": tree, "trees": [tree]})) == garden
