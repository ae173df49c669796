"""`payout.execute`: pays a batch out of escrow. It has no handler: remote workers run it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from job_registry import JobPolicy, JobType, Payload

Identifier = Annotated[str, Field(min_length=1, max_length=200)]


class PayoutExecute(Payload):
    """Pay one batch of payouts out of its escrow account."""

    batch_id: Identifier = Field(description="The batch to pay out.", examples=["batch-2030-01-31"])
    escrow_id: Identifier = Field(
        description="The escrow account the money comes from.", examples=["escrow-7"]
    )
    is_retry: bool = Field(
        default=False,
        description="Whether the batch was tried before, so that payouts already made are skipped.",
    )


payout_execute = JobType(
    name="payout.execute",
    payload=PayoutExecute,
    policy=JobPolicy(max_attempts=10, timeout_seconds=60, concurrency_limit=5),
)
