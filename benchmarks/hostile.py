"""Sends drawn hostile requests to servers, and holds each of them to the promised bounds.

    .venv/bin/python -m benchmarks.hostile [--minutes 10] [--seed S] [--kind K --request N]

Each round has a new server on a new SQLite file and a seed of its own, and sends a few requests of
each kind. A request that exceeds a bound is sent three times; the cheapest counts, because other
programs share the machine. Prints the ten dearest requests, and exits with 1 if a bound is
exceeded. `--seed S --kind K --request N` sends one of them again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.hostile import REQUESTS, Request, draw_requests
from tests.hostile_requests import Outcome, hostile_server, measure
from tests.measured_server import MeasuredServer

CPU_SECONDS: Final = 0.5
SILENCE_SECONDS: Final = 1.0
TRIES: Final = 3
PER_KIND: Final = 4
DEAREST: Final = 10


async def measured(server: MeasuredServer, request: Request) -> Outcome:
    """Send a request up to three times. Return the first outcome without faults, or the last."""
    for _ in range(TRIES):
        outcome = await measure(
            server, request, cpu_seconds=CPU_SECONDS, silence_seconds=SILENCE_SECONDS
        )
        if not outcome.faults:
            break
    return outcome


async def send_round(
    seed: int, kinds: list[str], only: int | None, end: float
) -> list[tuple[str, Outcome]]:
    """Send the requests of one seed. Return each outcome with the options that repeat it."""
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        async with hostile_server(Path(folder)) as server:
            for kind in kinds:
                for number, request in enumerate(draw_requests(kind, PER_KIND, seed=seed)):
                    if time.monotonic() > end or only not in (None, number):
                        continue
                    name = f'--seed {seed} --kind "{kind}" --request {number}'
                    outcome = await measured(server, request)
                    outcomes.append((name, outcome))
                    if outcome.faults or only is not None:
                        print(f"\n{name}\n{described(outcome)}", flush=True)
    return outcomes


def described(outcome: Outcome) -> str:
    """Return what a request was, what it cost, and what is wrong with it."""
    shape = outcome.shape
    lines = [figures(outcome), *outcome.faults, shape if len(shape) < 600 else f"{shape[:600]}..."]
    return "\n".join(f"    {line}" for line in lines)


def figures(outcome: Outcome) -> str:
    """Return the figures of a request in columns."""
    cost = outcome.cost
    return (
        f"{outcome.size / 1e6:6.2f} MB  {cost.cpu_seconds:5.2f} s CPU "
        f" {cost.peak_bytes / 1e6:5.0f} MB held  {cost.longest_silence_seconds:5.2f} s silent "
        f" {outcome.answer_bytes / 1e6:6.2f} MB answered  {outcome.stored:5} stored"
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--kind", choices=REQUESTS)
    parser.add_argument("--request", type=int)
    options = parser.parse_args()
    kinds = [options.kind] if options.kind else list(REQUESTS)
    end = time.monotonic() + options.minutes * 60
    outcomes: list[tuple[str, Outcome]] = []
    seed = options.seed
    print(f"Seed {seed}.", flush=True)
    while time.monotonic() < end:
        outcomes += await send_round(seed, kinds, options.request, end)
        seed += 1
        if options.request is not None:
            break
    faulty = [name for name, outcome in outcomes if outcome.faults]
    print(f"\n{len(outcomes)} requests in {seed - options.seed} rounds. The dearest in CPU:")
    outcomes.sort(key=lambda each: each[1].cost.cpu_seconds, reverse=True)
    for name, outcome in outcomes[:DEAREST]:
        print(f"{figures(outcome)}  {name}\n        {outcome.shape[:200]}")
    worst = max((outcome for _, outcome in outcomes), key=lambda each: each.cost.peak_bytes)
    print(f"The most memory:\n{figures(worst)}")
    print(f"{len(faulty)} requests exceed a bound." if faulty else "No request exceeds a bound.")
    sys.exit(bool(faulty))


if __name__ == "__main__":
    asyncio.run(main())
