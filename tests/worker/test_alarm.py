"""One timer for the times of many attempts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from job_registry_api.worker.alarm import Alarm


async def test_each_function_is_called_at_its_time_in_whatever_order_they_were_set() -> None:
    alarm, rung, began = Alarm(), dict[str, float](), time.monotonic()

    def ring(name: str) -> Callable[[], None]:
        return lambda: rung.update({name: time.monotonic() - began})

    alarm.set(ring("second"), began + 0.2)
    alarm.set(ring("first"), began + 0.05)
    alarm.set(ring("third"), began + 0.3)
    alarm.set(ring("past"), began - 1.0)
    await asyncio.sleep(0.6)
    assert list(rung) == ["past", "first", "second", "third"]
    assert rung["past"] < 0.05 <= rung["first"] < 0.2 <= rung["second"] < 0.3 <= rung["third"]


async def test_a_function_that_was_cleared_is_not_called_and_does_not_delay_another() -> None:
    alarm, rung = Alarm(), list[str]()

    def cleared() -> None:
        rung.append("cleared")

    def kept() -> None:
        rung.append("kept")

    alarm.set(cleared, time.monotonic() + 0.05)
    alarm.set(kept, time.monotonic() + 0.1)
    alarm.clear(cleared)
    await asyncio.sleep(0.3)
    assert rung == ["kept"]
    # It rings again after it has run out of times.
    alarm.set(kept, time.monotonic() + 0.02)
    await asyncio.sleep(0.2)
    assert rung == ["kept", "kept"]


async def test_a_function_may_set_its_next_time() -> None:
    alarm, rung = Alarm(), list[float]()

    def ring() -> None:
        rung.append(time.monotonic())
        if len(rung) < 3:
            alarm.set(ring, time.monotonic() + 0.02)

    alarm.set(ring, time.monotonic())
    await asyncio.sleep(0.4)
    assert len(rung) == 3
