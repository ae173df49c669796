"""The requests that every client sends, as in `programs/scenario.ts`. Prints the results."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Answer:
    """The data of an answer, which may be null, and its errors as the client returned them."""

    data: Any
    errors: Sequence[dict[str, Any]] = ()


class Client(Protocol):
    async def execute(self, operation: str, **variables: Any) -> Answer: ...

    def follow(self, job_id: str) -> AsyncIterator[dict[str, Any]]: ...


async def run_scenario(client: Client) -> None:
    first = {"type": "payout.execute", "payload": {"batchId": "b-1", "escrowId": "e-1"}}
    second = {"payoutExecute": {"batchId": "b-2", "escrowId": "e-1"}}
    third = {"payoutExecute": {"batchId": "b-3", "escrowId": "e-1", "isRetry": True}}
    job_id = _id_of(await client.execute("Enqueue", input=first))
    typed = _id_of(await client.execute("EnqueueTyped", job=second, options={"priority": 80}))
    mine = [_id_of(await client.execute("EnqueueTyped", job=third)), typed, job_id]

    read = (await client.execute("Job", id=typed)).data["job"]
    foreign = (await client.execute("Job", id=sys.argv[1])).data["job"]

    first_page = (await client.execute("Jobs", first=2)).data["jobs"]
    after = first_page["pageInfo"]["endCursor"]
    second_page = (await client.execute("Jobs", first=2, after=after)).data["jobs"]
    last_page = (await client.execute("Jobs", last=2)).data["jobs"]
    before = last_page["pageInfo"]["startCursor"]
    page_before = (await client.execute("Jobs", last=2, before=before)).data["jobs"]

    faulty = {"type": "thumbnail.create", "payload": {"assetId": "no/slash", "sizes": [128, 0]}}
    refused = (await client.execute("Enqueue", input=faulty)).data["result"]
    wrong = {"payoutExecute": {"batchId": 1, "escrowId": "e-1"}}
    wrong_type = await client.execute("EnqueueTyped", job=wrong)
    partial = await client.execute("JobAndPage", id=job_id, after="no cursor")

    events: list[str] = []
    async for data in client.follow(job_id):
        event = data["jobEvents"]
        events.append(f"{event['name']} {event['status']}")
        # The second `job.current` is the first event after the restart.
        if len(events) == 1:
            print("restart the server", flush=True)
        elif len(events) == 2:
            await client.execute("Cancel", id=job_id)
        else:
            break
    again = (await client.execute("Cancel", id=job_id)).data["result"]
    cancelled = (await client.execute("Job", id=job_id)).data["job"]

    report = {
        "read": {
            **{name: read[name] for name in ("type", "status", "priority", "payload", "createdBy")},
            "createdAt": re.match(r"20\d\d-\d\d-\d\dT.*Z$", read["createdAt"]) is not None,
        },
        "the job of another": foreign.get("code"),
        "pages": [
            {
                "jobs": [mine.index(job["id"]) for job in page["nodes"]],
                "next": page["pageInfo"]["hasNextPage"],
                "previous": page["pageInfo"]["hasPreviousPage"],
                "total": page["totalCount"],
            }
            for page in (first_page, second_page, last_page, page_before)
        ],
        "violations": [f"{each['path']} {each['code']}" for each in refused["violations"]],
        "a wrong type": [each["message"] for each in wrong_type.errors],
        "beside a failed field": {
            "data": {"job": partial.data["job"]["__typename"], "jobs": partial.data["jobs"]},
            "errors": [[each["path"], each["extensions"]["code"]] for each in partial.errors],
        },
        "events": events,
        "cancelled twice": again["code"],
        "read again": cancelled["status"],
    }
    print(json.dumps(report))


def _id_of(answer: Answer) -> str:
    return str(answer.data["result"]["job"]["id"])
