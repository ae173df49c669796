"""Pictures come into a bucket by presigned URLs: checked, bounded and never replaced, as uploads.

The bucket is that of a server from PyPI, which checks no signatures: what a URL allows is read from
the URL.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import fsspec
import httpx
import pytest

from tests.http_client import Visit
from tests.postgresql_server import free_port
from tests.test_uploads import JPEG, PNG, code_of, of_type, picture

UV: Final = str(Path(sys.executable).with_name("uv"))
SERVER: Final = ("moto[s3]==5.2.5", "flask", "flask-cors")
ASSETS: Final = "s3://pictures/assets"
PLACE: Final = "/assets/cat/1"

pytestmark = [
    pytest.mark.slow,
    # One process for all: it installs the packages and starts the bucket.
    pytest.mark.xdist_group("presigned"),
]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The file system of a bucket, which the application in this process uses too."""
    folder = tmp_path_factory.mktemp("s3fs")
    package = f"s3fs=={fsspec.__version__}"
    installed = subprocess.run(
        [UV, "pip", "install", "--quiet", "--python", sys.executable, "--target", folder, package],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if installed.returncode:
        pytest.skip(f"{package} cannot be installed: {installed.stderr[-300:]}")
    port = free_port()
    with_packages = [argument for each in SERVER for argument in ("--with", each)]
    server = subprocess.Popen(
        [UV, "run", "--no-project", "--isolated", *with_packages, "moto_server", f"-p{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            for _ in range(600):
                if server.poll() is not None:
                    pytest.skip(f"{SERVER[0]} cannot be installed")
                try:
                    httpx.get(f"http://127.0.0.1:{port}/moto-api/data.json")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield fsspec.filesystem("s3")
        finally:
            server.terminate()
            server.wait(10)


@pytest.fixture
async def client(visit: Visit, bucket: Any) -> AsyncIterator[httpx.AsyncClient]:
    bucket.mkdir("pictures", create_parents=True)
    async with visit(assets=ASSETS, max_upload_bytes="5000") as opened:
        yield opened
    bucket.rm("pictures", recursive=True)


def objects(bucket: Any) -> list[str]:
    found = bucket.find("pictures", refresh=True)
    return [path.removeprefix("pictures/assets/") for path in found]


async def send(client: httpx.AsyncClient, content: bytes, place: str = PLACE) -> str:
    """Send a picture to the bucket, and return the id to finish with."""
    answer = await client.post(f"{place}/presign", json={"bytes": len(content)})
    assert answer.status_code == 201, answer.text
    presigned = answer.json()
    async with httpx.AsyncClient() as browser:
        stored = await browser.put(presigned["url"], content=content)
    assert stored.status_code == 200, stored.text
    upload_id = presigned["uploadId"]
    assert isinstance(upload_id, str)
    return upload_id


async def finish(client: httpx.AsyncClient, upload_id: str, place: str = PLACE) -> httpx.Response:
    return await client.post(f"{place}/finish", json={"uploadId": upload_id})


async def test_a_picture_is_sent_to_the_bucket_and_finished(
    client: httpx.AsyncClient, bucket: Any
) -> None:
    upload_id = await send(client, PNG)
    assert not [path for path in objects(bucket) if path.startswith("cat/")]
    stored = await finish(client, upload_id)
    assert stored.status_code == 201, stored.text
    assert stored.json() == {"assetId": "cat", "versionNumber": 1, "bytes": len(PNG)}
    assert objects(bucket) == ["cat/1.png"]
    assert bucket.cat_file("pictures/assets/cat/1.png") == PNG
    assert code_of(await finish(client, upload_id)) == (404, "upload_not_found")


async def test_a_url_is_valid_for_one_size_and_for_fifteen_minutes(
    client: httpx.AsyncClient,
) -> None:
    answer = await client.post(f"{PLACE}/presign", json={"bytes": 100})
    signed = parse_qs(urlsplit(answer.json()["url"]).query)
    assert "content-length" in signed["X-Amz-SignedHeaders"][0].split(";")
    assert signed["X-Amz-Expires"] == ["900"]
    other = await client.post(f"{PLACE}/presign", json={"bytes": 100})
    assert other.json()["uploadId"] != answer.json()["uploadId"]
    assert code_of(await client.post(f"{PLACE}/presign", json={"bytes": 5_001})) == (
        413,
        "too_large",
    )


async def test_a_version_is_never_replaced_and_the_same_picture_may_come_again(
    client: httpx.AsyncClient, bucket: Any
) -> None:
    first, same, other, another_format = [
        await send(client, content) for content in (PNG, PNG, picture(colour="blue"), JPEG)
    ]
    assert (await finish(client, first)).status_code == 201
    assert (await finish(client, same)).status_code == 201
    for refused in (other, another_format):
        assert code_of(await finish(client, refused)) == (409, "asset_exists")
    streamed = await client.post(PLACE, content=JPEG, headers=of_type("image/jpeg"))
    assert code_of(streamed) == (409, "asset_exists")
    assert objects(bucket) == ["cat/1.png"]
    assert bucket.cat_file("pictures/assets/cat/1.png") == PNG


async def test_a_picture_that_another_process_kept_meanwhile_is_not_replaced(
    client: httpx.AsyncClient, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job_registry.asset_files import AssetFiles

    upload_id = await send(client, picture(colour="blue"))
    bucket.pipe_file("pictures/assets/cat/1.png", PNG)
    found = AssetFiles._sources
    answers: Iterator[list[Any]] = iter([[]])  # As another process sees the bucket just before.
    monkeypatch.setattr(AssetFiles, "_sources", lambda files: next(answers, None) or found(files))
    assert code_of(await finish(client, upload_id)) == (409, "asset_exists")
    assert bucket.cat_file("pictures/assets/cat/1.png") == PNG


async def test_an_upload_that_another_request_finishes_meanwhile_is_not_found(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job_registry.asset_files import AssetFiles

    # As another request sees the bucket just before the picture is removed.
    monkeypatch.setattr(AssetFiles, "uploaded_size", lambda files, upload_id: 100)
    assert code_of(await finish(client, "0" * 32)) == (404, "upload_not_found")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<svg/>" * 100, (422, "asset_invalid")),
        (PNG[:4], (422, "asset_invalid")),
        (PNG + bytes(5_000), (413, "too_large")),
    ],
    ids=["another type", "too short", "too large"],
)
async def test_what_is_in_the_bucket_is_checked(
    client: httpx.AsyncClient, bucket: Any, content: bytes, expected: tuple[int, str]
) -> None:
    presigned = (await client.post(f"{PLACE}/presign", json={"bytes": 1})).json()
    async with httpx.AsyncClient() as browser:
        await browser.put(presigned["url"], content=content)
    assert code_of(await finish(client, presigned["uploadId"])) == expected
    assert objects(bucket) == []


async def test_an_upload_is_finished_at_the_place_that_its_url_is_for(
    client: httpx.AsyncClient, bucket: Any
) -> None:
    upload_id = await send(client, PNG)
    for unknown in (
        await finish(client, upload_id, "/assets/cat/2"),
        await finish(client, "0" * 32),
        await finish(client, "../../cat/1.png"),
    ):
        assert code_of(unknown) == (404, "upload_not_found")
    assert (await finish(client, upload_id)).status_code == 201


async def test_a_bucket_that_is_away_is_a_503(visit: Visit, bucket: Any) -> None:
    async with visit(assets="s3://missing/assets") as client:
        answer = await client.post(PLACE, content=PNG, headers=of_type("image/png"))
        assert code_of(answer) == (503, "assets_unavailable")
        assert code_of(await finish(client, "0" * 32)) == (404, "upload_not_found")
