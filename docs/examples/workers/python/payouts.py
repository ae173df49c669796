"""A worker of `payout.execute`, with a stand-in for the bank.

python payouts.py http://127.0.0.1:8000/graphql
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from jobs import Fail, Job, Snooze
from protocol import Refused
from worker import main

BANK_SECONDS = float(os.environ.get("BANK_SECONDS", "8"))


async def pay(job: Job) -> dict[str, Any]:
    """Pay a batch from an escrow. The id of the escrow says what the bank does."""
    batch, escrow = job.payload["batchId"], job.payload["escrowId"]
    if escrow == "unknown":
        raise Fail("escrow_unknown", f"There is no escrow {escrow}.", retryable=False)
    if escrow == "closed" and job.attempt == 1:
        raise Fail("bank_closed", "The bank is closed.", after=1)
    if escrow == "review":
        raise Snooze(3600)
    job.progress({"paying": batch})
    # A cancelled job, a timeout and a lost lease raise CancelledError here. Blocking code runs in
    # `asyncio.to_thread`, where nothing can stop it: give its calls timeouts of their own.
    await asyncio.sleep(BANK_SECONDS)
    return {"paid": batch, "attempt": job.attempt}


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], {"payout.execute": pay}))
    except Refused as error:
        sys.exit(str(error))
