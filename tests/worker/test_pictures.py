"""`thumbnail.create` in its processes: hostile pictures keep to its memory limit."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from job_registry import EnqueueRequest, JobRegistry
from job_registry.catalog.thumbnail import MEMORY_LIMIT_MB, thumbnail_create
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker import Worker

pytestmark = [
    pytest.mark.any_database,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc"),
]

IDLE_MB = 80
"""What an idle process has in memory, generously."""


@asynccontextmanager
async def working(database_url: str, assets: Path, concurrency: int) -> AsyncIterator[JobQueue]:
    database = open_database(database_url)
    queue = JobQueue(JobRegistry([thumbnail_create]), database)
    async with queue.events.listening():
        worker = Worker(queue, concurrency=concurrency, assets=str(assets), shutdown_seconds=2)
        task = asyncio.create_task(worker.run())
        try:
            yield queue
        finally:
            worker.stop()
            await asyncio.wait_for(task, 20)
    await database.close()


async def enqueue(queue: JobQueue, size: int, version: int = 1) -> JobRecord:
    payload = {"assetId": "a", "versionNumber": version, "sizes": [size]}
    return (await queue.enqueue(EnqueueRequest("thumbnail.create", payload))).job


async def until_it_ended(queue: JobQueue, job: JobRecord) -> JobRecord:
    async with asyncio.timeout(60):
        while (now := await queue.get(job.id)).finished_at is None:
            await asyncio.sleep(0.02)
    return now


def peaks_mb() -> list[int]:
    """The most memory that each process of a handler has had."""
    peaks = []
    for process in psutil.Process().children():
        if any("job_registry_api.worker.child" in each for each in process.cmdline()):
            text = Path(f"/proc/{process.pid}/status").read_text("utf-8")
            peaks.append(int(text.partition("VmHWM:")[2].split()[0]) // 1024)
    return peaks


def put(assets: Path, image: Image.Image, form: str, **options: Any) -> None:
    (assets / "a").mkdir()
    image.save(assets / "a/1.picture", form, **options)


async def test_a_picture_of_a_hundred_million_pixels_takes_no_memory(
    database_url: str, tmp_path: Path
) -> None:
    put(tmp_path, Image.new("1", (10_000, 10_000)), "PNG", compress_level=1)
    async with working(database_url, tmp_path, concurrency=1) as queue:
        failed = await until_it_ended(queue, await enqueue(queue, 128))
        (peak,) = peaks_mb()
    assert failed.error is not None
    assert failed.error.code == "failed"
    assert "is too large: it has 10,000 x 10,000 pixels" in failed.error.message
    assert peak < IDLE_MB + 50


def half_noise(mode: str, width: int, height: int, rows: int) -> Image.Image:
    image = Image.new(mode, (width, height))
    noise = os.urandom(width * rows * len(image.getbands()))
    image.paste(Image.frombytes(mode, (width, rows), noise), (0, 0))
    return image


# Each is as large as its limits allow, and is to become the largest thumbnail.
WORST: dict[str, Callable[[], tuple[Image.Image, str, dict[str, Any]]]] = {
    "png with alpha": lambda: (half_noise("RGBA", 5_792, 5_792, 1_400), "PNG", {}),
    "png with a transparent colour": lambda: (
        Image.new("RGB", (5_792, 5_792)),
        "PNG",
        {"transparency": (1, 2, 3)},
    ),
    "png of 16 bits": lambda: (Image.new("I;16", (5_792, 5_792), 999), "PNG", {}),
    "gif": lambda: (
        Image.new("P", (5_792, 5_792)),
        "GIF",
        {"transparency": 0, "disposal": 2},
    ),
    "jpeg": lambda: (Image.new("RGB", (8_191, 8_191)), "JPEG", {"subsampling": 0}),
    "progressive jpeg": lambda: (
        Image.effect_noise((4_728, 4_728), 60).convert("CMYK"),
        "JPEG",
        {"subsampling": 0, "progressive": True},
    ),
    "webp": lambda: (
        half_noise("RGBA", 3_663, 3_663, 2_000),
        "WEBP",
        {"lossless": True, "quality": 0, "method": 0},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("worst", WORST)
async def test_the_largest_pictures_keep_to_the_memory_limit(
    database_url: str, tmp_path: Path, worst: str
) -> None:
    image, form, options = WORST[worst]()
    put(tmp_path, image, form, **options)
    del image
    async with working(database_url, tmp_path, concurrency=1) as queue:
        done = await until_it_ended(queue, await enqueue(queue, 3_547))
        (peak,) = peaks_mb()
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert peak < IDLE_MB + MEMORY_LIMIT_MB


@pytest.mark.slow
async def test_eight_at_once_keep_to_eight_times_the_limit(
    database_url: str, tmp_path: Path
) -> None:
    put(tmp_path, Image.new("RGBA", (5_792, 5_792), (1, 2, 3, 4)), "PNG", compress_level=1)
    more = Image.new("RGBA", (9_999, 9_999), (1, 2, 3, 4))
    more.save(tmp_path / "a/2.png", "PNG", compress_level=1)
    async with working(database_url, tmp_path, concurrency=8) as queue:
        jobs = [await enqueue(queue, 3_547, version) for version in (1, 2) * 4]
        ended = [(await until_it_ended(queue, job)).status for job in jobs]
        peaks = peaks_mb()
    assert ended == [JobStatus.SUCCEEDED, JobStatus.FAILED] * 4
    assert sum(peaks) < 8 * (IDLE_MB + MEMORY_LIMIT_MB)
