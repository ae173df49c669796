"""Pictures come into the assets by HTTP: whole or not at all, bounded, and never replaced."""

from __future__ import annotations

import asyncio
import io
import os
import re
import resource
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
import structlog
from PIL import Image

from job_registry_api import uploads
from job_registry_api.uploads import AssetsUnavailable, Uploads
from tests.http_client import Visit, serving
from tests.test_auth import AUTH, bearer


def picture(format_name: str = "PNG", colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 32), colour).save(file, format_name)
    return file.getvalue()


PNG, JPEG = picture(), picture("JPEG")


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    folder = tmp_path / "assets"
    folder.mkdir(mode=0o700)
    return folder


def of_type(media_type: str) -> dict[str, str]:
    return {"content-type": media_type}


def files_of(folder: Path) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


async def post(
    client: httpx.AsyncClient, content: Any = PNG, media_type: str = "image/png", place: str = "a/1"
) -> httpx.Response:
    return await client.post(f"/assets/{place}", content=content, headers=of_type(media_type))


def log_of_uploads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that fills with what uploads log."""
    capture = structlog.testing.LogCapture()
    logger = structlog.wrap_logger(
        None, processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(0)
    )
    monkeypatch.setattr(uploads, "log", logger)
    return capture.entries


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_a_page_uploads_a_picture_and_gets_its_thumbnails(
    database_url: str, assets: Path
) -> None:
    async with (
        serving(database_url, assets=str(assets)) as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=20) as client,
    ):
        stored = await post(client, place="cat/1")
        assert stored.status_code == 201
        assert stored.json() == {"assetId": "cat", "versionNumber": 1, "bytes": len(PNG)}
        payload = {name: stored.json()[name] for name in ("assetId", "versionNumber")}
        job = {"type": "thumbnail.create", "payload": {**payload, "sizes": [16]}}
        job_id = (await client.post("/jobs", json=job)).json()["jobId"]
        async with asyncio.timeout(20):
            found: dict[str, Any] = {}
            while found.get("finishedAt") is None:
                await asyncio.sleep(0.1)
                found = (await client.get(f"/jobs/{job_id}")).json()
    assert found["status"] == "succeeded", found["error"]
    assert files_of(assets) == ["cat/1.png", "cat/1/16.webp"]
    assert (assets / "cat" / "1.png").stat().st_mode & 0o777 == 0o600
    assert (assets / "cat").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("format_name", "media_type", "extension"),
    [
        ("JPEG", "image/jpeg", "jpg"),
        ("PNG", "image/png; q=1", "png"),
        ("WEBP", "IMAGE/WEBP", "webp"),
        ("GIF", "image/gif", "gif"),
    ],
)
async def test_the_formats_that_thumbnails_are_made_of_are_taken(
    visit: Visit, assets: Path, format_name: str, media_type: str, extension: str
) -> None:
    async with visit(assets=str(assets)) as client:
        assert (await post(client, picture(format_name), media_type)).status_code == 201
    assert files_of(assets) == [f"a/1.{extension}"]


async def test_a_version_is_never_replaced_and_the_same_picture_may_come_again(
    visit: Visit, assets: Path
) -> None:
    async with visit(assets=str(assets)) as client:
        assert (await post(client)).status_code == 201
        assert (await post(client)).status_code == 201
        other = await post(client, picture(colour="blue"))
        longer = await post(client, PNG + b"more")
        shorter = await post(client, PNG[:-1])
        another_format = await post(client, JPEG, "image/jpeg")
        next_version = await post(client, JPEG, "image/jpeg", "a/2")
    for refused in (other, longer, shorter, another_format):
        assert code_of(refused) == (409, "asset_exists")
    assert next_version.status_code == 201
    assert (assets / "a" / "1.png").read_bytes() == PNG
    assert files_of(assets) == ["a/1.png", "a/2.jpg"]


async def test_of_uploads_at_the_same_time_at_most_one_is_kept(visit: Visit, assets: Path) -> None:
    async with visit(assets=str(assets)) as client:
        for version in range(1, 6):
            answers = await asyncio.gather(
                *(post(client, JPEG, "image/jpeg", f"a/{version}") for _ in range(3)),
                *(post(client, PNG, "image/png", f"a/{version}") for _ in range(3)),
            )
            kept = [each for each in files_of(assets) if each.startswith(f"a/{version}.")]
            assert len(kept) <= 1
            assert {each.status_code for each in answers} <= {201, 409}
            assert any(each.status_code == 201 for each in answers) == bool(kept)


async def test_an_upload_whose_rival_is_removed_meanwhile_is_stored(
    visit: Visit, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three at once, one may find the file of another, which the third one has just removed."""

    really, rivals = os.link, [1]

    def link(source: Path, target: str) -> None:
        if rivals and rivals.pop():
            raise FileExistsError(target)
        really(source, target)

    async with visit(assets=str(assets)) as client:
        monkeypatch.setattr(os, "link", link)
        assert (await post(client)).status_code == 201
    assert files_of(assets) == ["a/1.png"]


async def test_an_upload_that_always_finds_a_rival_without_a_file_can_be_sent_again(
    visit: Visit, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: str) -> None:
        raise FileExistsError(target)

    async with visit(assets=str(assets)) as client:
        monkeypatch.setattr(os, "link", link)
        assert code_of(await post(client)) == (503, "assets_unavailable")
    assert files_of(assets) == []


async def test_a_picture_may_be_larger_than_other_requests(database_url: str, assets: Path) -> None:
    large = bytes(20_000_000)
    async with (
        serving(database_url, "--no-worker", assets=str(assets)) as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=20) as client,
    ):
        assert (await post(client, PNG + large)).status_code == 201
        assert code_of(await post(client, large)) == (422, "asset_invalid")
        job = await client.post("/jobs", content=large, headers=of_type("application/json"))
        assert code_of(job) == (413, "too_large")


async def test_a_client_that_hangs_up_leaves_nothing(database_url: str, assets: Path) -> None:
    async with serving(database_url, "--no-worker", assets=str(assets)) as (address, _):
        host, _, port = address.partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = (
            "POST /assets/a/1 HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n"
            "content-length: 100000\r\n\r\n"
        )
        writer.write(head.encode() + PNG)
        await writer.drain()
        await wait_until(lambda: any(name.endswith(".partial") for name in files_of(assets)))
        writer.close()
        await wait_until(lambda: files_of(assets) == [])


async def wait_until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (of another process)
            await asyncio.sleep(0.02)


async def pieces(content: bytes, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield content


@pytest.mark.parametrize("declared", [True, False])
async def test_a_picture_is_bounded(visit: Visit, assets: Path, declared: bool) -> None:
    async with visit(assets=str(assets), max_upload_bytes="1000") as client:
        content: Any = PNG * 20 if declared else pieces(PNG, 20)
        answer = await post(client, content)
    assert code_of(answer) == (413, "too_large")
    assert files_of(assets) == []


@pytest.mark.parametrize(
    ("content", "media_type", "expected"),
    [
        (JPEG, "image/png", (422, "asset_invalid")),
        (b"", "image/png", (422, "asset_invalid")),
        (PNG[:4], "image/png", (422, "asset_invalid")),
        (b"<svg/>" * 100, "image/png", (422, "asset_invalid")),
        (b"RIFF\0\0\0\0WAVE" * 9, "image/webp", (422, "asset_invalid")),
        (b"<svg/>", "image/svg+xml", (415, "unsupported_media_type")),
        (PNG, "application/json", (415, "unsupported_media_type")),
        (PNG, "", (415, "unsupported_media_type")),
        (PNG, "multipart/form-data; boundary=a", (415, "unsupported_media_type")),
    ],
)
async def test_what_is_no_picture_is_refused(
    visit: Visit, assets: Path, content: bytes, media_type: str, expected: tuple[int, str]
) -> None:
    async with visit(assets=str(assets)) as client:
        assert code_of(await post(client, content, media_type)) == expected
    assert files_of(assets) == []


@pytest.mark.parametrize(
    "place",
    [
        *(".hidden/1", "a%00/1", f"{'a' * 201}/1", "é/1"),
        *("a/0", "a/-1", "a/+1", "a/01", "a/1_0", "a/1.5", "a/x", "a/%D9%A1", "a/2147483648"),
    ],
)
async def test_a_place_that_is_none_is_refused(visit: Visit, assets: Path, place: str) -> None:
    async with visit(assets=str(assets)) as client:
        assert code_of(await post(client, place=place)) == (422, "asset_invalid")
        assert (await post(client, place="a/..%2f..%2fb/1")).status_code == 404
    assert files_of(assets) == []


async def test_a_link_that_leads_out_of_the_assets_is_not_followed(
    visit: Visit, assets: Path
) -> None:
    outside = assets.parent / "outside"
    outside.mkdir()
    (assets / "a").symlink_to(outside)
    async with visit(assets=str(assets)) as client:
        assert code_of(await post(client)) == (422, "asset_invalid")
    assert files_of(outside) == []


async def test_a_storage_that_fails_is_told_without_its_paths(visit: Visit, assets: Path) -> None:
    (assets / "file").write_text("")
    async with visit(assets=str(assets / "file")) as client:
        answer = await post(client)
    assert code_of(answer) == (503, "assets_unavailable")
    assert str(assets) not in answer.text
    assert "retry-after" in answer.headers


@pytest.mark.parametrize("where", ["folder", "bucket"])
async def test_a_picture_that_fills_the_disk_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, assets: Path, tmp_path: Path, where: str
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    place = str(assets) if where == "folder" else f"memory://bucket{os.urandom(4).hex()}"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))  # As a disk without room.
    try:
        with pytest.raises(AssetsUnavailable):
            await Uploads(place, 1_000_000).store("a", "1", "image/png", pieces(PNG, 5_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert files_of(assets) == files_of(temporary) == []


async def test_the_assets_may_be_in_the_folder_of_the_user(
    monkeypatch: pytest.MonkeyPatch, visit: Visit, assets: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    async with visit(assets="~/assets") as client:
        assert (await post(client)).status_code == 201
    assert files_of(assets) == ["a/1.png"]


async def test_pictures_are_stored_in_a_bucket_too(visit: Visit) -> None:
    bucket = f"memory://bucket{os.urandom(4).hex()}"
    async with visit(assets=bucket) as client:
        assert (await post(client)).status_code == 201
        assert (await post(client)).status_code == 201
        assert code_of(await post(client, JPEG, "image/jpeg")) == (409, "asset_exists")
    with fsspec.open(f"{bucket}/a/1.png", "rb") as file:
        assert file.read() == PNG


class StalledBucket(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A bucket behind a network that answers nothing."""

    protocol = "stalled"
    answers = threading.Event()

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        assert self.answers.wait(30)
        return []

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        pass


async def test_a_bucket_that_does_not_answer_is_a_503_and_holds_up_nothing_else() -> None:
    fsspec.register_implementation("stalled", StalledBucket, clobber=True)
    stalled = Uploads("stalled://bucket", 1_000, storage_seconds=0.5)
    try:
        for _ in range(3):
            for failed in await asyncio.gather(
                *(stalled.store("a", "1", "image/png", pieces(PNG, 1)) for _ in range(10)),
                return_exceptions=True,
            ):
                assert isinstance(failed, AssetsUnavailable)
        async with asyncio.timeout(1):
            assert await asyncio.to_thread(lambda: "at once") == "at once"
    finally:
        StalledBucket.answers.set()
    # It works again, after what was left of the others.
    assert (await stalled.store("a", "2", "image/png", pieces(PNG, 1))).size == len(PNG)


class BucketWithoutCredentials(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A bucket whose client raises an error of its own."""

    protocol = "without-credentials"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        raise RuntimeError("Unable to locate credentials")


async def test_an_error_of_any_class_from_a_bucket_is_a_503() -> None:
    fsspec.register_implementation("without-credentials", BucketWithoutCredentials, clobber=True)
    without_credentials = Uploads("without-credentials://bucket", 1_000)
    with pytest.raises(AssetsUnavailable):
        await without_credentials.store("a", "1", "image/png", pieces(PNG, 1))


class BucketThatConnectsSlowly(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A bucket whose client looks for credentials on the network."""

    protocol = "connecting"
    may_connect = threading.Event()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        assert self.may_connect.wait(30)


async def test_a_bucket_that_connects_slowly_holds_up_nothing_else() -> None:
    fsspec.register_implementation("connecting", BucketThatConnectsSlowly, clobber=True)
    connecting = Uploads("connecting://bucket", 1_000, storage_seconds=0.5)
    threading.Timer(5, BucketThatConnectsSlowly.may_connect.set).start()
    try:
        async with asyncio.timeout(3):
            with pytest.raises(AssetsUnavailable):
                await connecting.store("a", "1", "image/png", pieces(PNG, 1))
            with pytest.raises(AssetsUnavailable):
                await connecting.presign("a", "1", 100)
            with pytest.raises(AssetsUnavailable):
                await connecting.finish("a", "1", "0" * 32)
    finally:
        BucketThatConnectsSlowly.may_connect.set()


@pytest.mark.parametrize("assets", ["box://bucket", "none://bucket"])
async def test_a_storage_without_its_package_is_a_503_and_the_log_names_it(
    visit: Visit, assets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = log_of_uploads(monkeypatch)
    async with visit(assets=assets) as client:
        uploaded = await post(client)
        presigned = await client.post("/assets/a/1/presign", json={"bytes": 100})
    assert code_of(uploaded) == code_of(presigned) == (503, "assets_unavailable")
    assert [entry["event"] for entry in logged] == ["upload.failed"] * 2
    for entry in logged:
        assert re.search("install boxfs|Protocol not known: none", entry["reason"])


async def test_uploads_can_be_switched_off(visit: Visit) -> None:
    async with visit(max_upload_bytes="0") as client:
        assert (await post(client)).status_code == 404
        assert "assets" not in (await client.get("/openapi.json")).text


async def test_an_upload_needs_the_scope_to_enqueue(visit: Visit, assets: Path) -> None:
    async with visit(assets=str(assets), **AUTH) as client:
        assert (await post(client)).status_code == 401
        for scope, status in (("jobs:read", 403), ("jobs:enqueue", 201)):
            headers = of_type("image/png") | bearer(scope=scope)
            answer = await client.post("/assets/a/1", content=PNG, headers=headers)
            assert answer.status_code == status


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("a/1/presign", {"bytes": 100}, (409, "presigned_urls_missing")),
        ("a/1/presign", {"bytes": 100.0}, (409, "presigned_urls_missing")),
        ("a/1/presign", {"bytes": 100.5}, (422, "validation_error")),
        ("a/1/presign", {"bytes": 33_554_433}, (413, "too_large")),
        ("a/1/presign", {"bytes": "100"}, (422, "validation_error")),
        ("a/1/presign", {"bytes": 0}, (422, "validation_error")),
        ("a/1/presign", {"bytes": 1, "type": "image/png"}, (422, "validation_error")),
        ("a/0/presign", {"bytes": 100}, (422, "asset_invalid")),
        ("a/1/finish", {"uploadId": "0" * 32}, (404, "upload_not_found")),
        ("a/1/finish", {"uploadId": "../1.png"}, (404, "upload_not_found")),
        ("a/1/finish", {"uploadId": 1}, (422, "validation_error")),
        ("a/1/finish", {}, (422, "validation_error")),
        ("a/0/finish", {"uploadId": "0" * 32}, (422, "asset_invalid")),
    ],
)
async def test_a_folder_has_no_presigned_urls(
    visit: Visit, assets: Path, path: str, body: Any, expected: tuple[int, str]
) -> None:
    async with visit(assets=str(assets)) as client:
        assert code_of(await client.post(f"/assets/{path}", json=body)) == expected


@pytest.mark.parametrize("path", ["presign", "finish"])
async def test_presigned_urls_need_the_scope_to_enqueue(visit: Visit, path: str) -> None:
    async with visit(**AUTH) as client:
        body = {"bytes": 1} if path == "presign" else {"uploadId": "0" * 32}
        for scope, status in (("jobs:read", 403), ("jobs:own", 404 if path == "finish" else 409)):
            headers = bearer(scope=scope)
            answer = await client.post(f"/assets/a/1/{path}", json=body, headers=headers)
            assert answer.status_code == status
