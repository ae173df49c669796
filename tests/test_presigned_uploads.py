"""Pictures come into a bucket by presigned URLs: checked, bounded and never replaced, as uploads.

The same program of a client sends them to S3, Google Cloud Storage and Azure.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

import fsspec
import httpx
import pytest
import uvicorn
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256

from job_registry.catalog.thumbnail import ThumbnailCreate, render
from job_registry.testing import job_context
from job_registry_api import uploads
from tests.buckets import (
    AZURE_ACCOUNT,
    SERVERS,
    Bucket,
    clients_installed,
    google_public_key,
)
from tests.docs.pages import blocks
from tests.http_client import Visit, application_of
from tests.node_packages import build_project, skip_without_packages
from tests.postgresql_server import free_port
from tests.test_auth import AUTH, bearer
from tests.test_uploads import JPEG, PNG, code_of, log_of_uploads, of_type, picture

PLACE: Final = "/assets/cat/1"

pytestmark = [
    pytest.mark.slow,
    # One process for all: it installs the packages and starts the buckets.
    pytest.mark.xdist_group("presigned"),
]


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """One database is enough: nothing here depends on it."""
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    return f"sqlite:///{tmp_path / 'jobs.db'}"


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The clients of all buckets, and a folder for what their servers need."""
    folder = tmp_path_factory.mktemp("clients")
    with clients_installed(folder / "packages"):
        yield folder


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, clients: Path) -> Iterator[tuple[str, Any]]:
    """A server of each kind in turn, and its file system, which the application here uses too."""
    kind = request.param
    with SERVERS[kind](clients / kind) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        files = fsspec.filesystem(kind)
        files.mkdir("pictures")
        yield kind, files


@pytest.fixture
def bucket(server: tuple[str, Any]) -> Bucket:
    kind, files = server
    return Bucket(kind, files, f"pictures/{secrets.token_hex(4)}")


@pytest.fixture
async def client(visit: Visit, bucket: Bucket) -> AsyncIterator[httpx.AsyncClient]:
    async with visit(assets=bucket.assets, max_upload_bytes="5000") as opened:
        yield opened


async def presign(
    client: httpx.AsyncClient, size: int = len(PNG), place: str = PLACE
) -> dict[str, Any]:
    answer = await client.post(f"{place}/presign", json={"bytes": size})
    assert answer.status_code == 201, answer.text
    presigned = answer.json()
    assert isinstance(presigned, dict)
    return presigned


async def write(presigned: Mapping[str, Any], content: bytes) -> httpx.Response:
    """Send a picture to the bucket, as a browser does."""
    method, url, headers = (presigned[name] for name in ("method", "url", "headers"))
    if "X-Goog-Signature" in url:
        check_google_signature(method, url, headers)
    async with httpx.AsyncClient() as browser:
        return await browser.request(method, url, headers=headers, content=content)


async def send(client: httpx.AsyncClient, content: bytes) -> str:
    """Send a picture to the bucket, and return the id to finish with."""
    presigned = await presign(client, len(content))
    written = await write(presigned, content)
    assert written.is_success, written.text
    upload_id = presigned["uploadId"]
    assert isinstance(upload_id, str)
    return upload_id


async def finish(client: httpx.AsyncClient, upload_id: str, place: str = PLACE) -> httpx.Response:
    return await client.post(f"{place}/finish", json={"uploadId": upload_id})


def check_google_signature(method: str, url: str, headers: Mapping[str, str]) -> None:
    """Check a request as Google Cloud Storage does, by its specification of version 4.

    Raises:
        InvalidSignature: another request was signed.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    signature = query.pop("X-Goog-Signature")
    signed = query["X-Goog-SignedHeaders"].split(";")
    sent = {"host": parts.netloc} | {name.lower(): value for name, value in headers.items()}
    assert {name for name in sent if name == "host" or name.startswith("x-goog-")} <= {*signed}
    canonical = "\n".join(
        (
            method,
            parts.path,
            urlencode(sorted(query.items()), quote_via=quote, safe="-_.~"),
            *(f"{name}:{sent[name]}" for name in sorted(signed)),
            "",
            ";".join(sorted(signed)),
            "UNSIGNED-PAYLOAD",
        )
    )
    account, _, scope = query["X-Goog-Credential"].partition("/")
    assert account == "jobs@pictures.iam.gserviceaccount.com"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"GOOG4-RSA-SHA256\n{query['X-Goog-Date']}\n{scope}\n{digest}"
    google_public_key().verify(bytes.fromhex(signature), text.encode(), PKCS1v15(), SHA256())


async def test_a_picture_is_sent_to_the_bucket_and_finished(
    client: httpx.AsyncClient, bucket: Bucket
) -> None:
    upload_id = await send(client, PNG)
    assert not [name for name in bucket.objects() if name.startswith("cat/")]
    stored = await finish(client, upload_id)
    assert stored.status_code == 201, stored.text
    assert stored.json() == {"assetId": "cat", "versionNumber": 1, "bytes": len(PNG)}
    assert bucket.objects() == ["cat/1.png"]
    assert bucket.read("cat/1.png") == PNG
    assert code_of(await finish(client, upload_id)) == (404, "upload_not_found")


async def test_a_url_is_valid_for_one_file_and_for_fifteen_minutes(
    client: httpx.AsyncClient, bucket: Bucket
) -> None:
    presigned, other = await presign(client, 100), await presign(client, 100)
    assert presigned["uploadId"] != other["uploadId"]
    assert urlsplit(presigned["url"]).path.endswith(f"/.uploads/cat/1/{presigned['uploadId']}")
    in_fifteen_minutes = datetime.now(UTC) + timedelta(minutes=15)
    expires_at = datetime.fromisoformat(presigned["expiresAt"])
    assert abs(expires_at - in_fifteen_minutes) < timedelta(seconds=10)
    signed = {name: value for name, (value,) in parse_qs(urlsplit(presigned["url"]).query).items()}
    match bucket.kind:
        case "s3":
            assert signed["X-Amz-Expires"] == "900"
        case "gs":
            assert signed["X-Goog-Expires"] == "900"
        case "az":
            expiry = datetime.fromisoformat(signed["se"])
            assert abs(expiry - in_fifteen_minutes) < timedelta(seconds=10)
            assert (signed["sr"], signed["sp"]) == ("b", "c")  # A blob, to be created.


async def test_a_url_is_valid_for_one_size_where_the_bucket_can_check_it(
    client: httpx.AsyncClient, bucket: Bucket
) -> None:
    presigned = await presign(client, 100)
    headers = presigned["headers"]
    match bucket.kind:
        case "s3":
            signed = parse_qs(urlsplit(presigned["url"]).query)["X-Amz-SignedHeaders"][0]
            assert "content-length" in signed.split(";")
        case "gs":
            assert headers["x-goog-content-length-range"] == "100,100"
            for name, value in (
                ("x-goog-content-length-range", "1,100"),
                ("x-goog-if-generation-match", "1"),
            ):
                with pytest.raises(InvalidSignature):
                    check_google_signature("PUT", presigned["url"], headers | {name: value})
    too_large = await client.post(f"{PLACE}/presign", json={"bytes": 5_001})
    assert code_of(too_large) == (413, "too_large")


async def test_a_url_of_azure_creates_and_nothing_else(
    client: httpx.AsyncClient, bucket: Bucket
) -> None:
    if bucket.kind != "az":
        pytest.skip("the servers of the others check no signatures")
    presigned = await presign(client)
    assert (await write(presigned, PNG)).status_code == 201
    assert (await write(presigned, JPEG)).status_code == 403
    elsewhere = presigned["url"].replace(presigned["uploadId"], "0" * 32)
    assert (await write({**presigned, "url": elsewhere}, PNG)).status_code == 403
    for method in ("GET", "DELETE"):
        assert (await write({**presigned, "method": method}, b"")).status_code == 403
    assert bucket.read(f".uploads/cat/1/{presigned['uploadId']}") == PNG


async def test_a_url_of_azure_expires(
    client: httpx.AsyncClient, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bucket.kind != "az":
        pytest.skip("the servers of the others check no signatures")
    monkeypatch.setattr(uploads, "PRESIGNED_SECONDS", 1)
    presigned = await presign(client)
    await asyncio.sleep(2.1)
    assert (await write(presigned, PNG)).status_code == 403
    assert bucket.objects() == []


async def test_a_picture_may_be_finished_after_it_was_not_there_yet(
    client: httpx.AsyncClient,
) -> None:
    presigned = await presign(client)
    too_early = await finish(client, presigned["uploadId"])
    assert code_of(too_early) == (404, "upload_not_found")
    await write(presigned, PNG)
    assert (await finish(client, presigned["uploadId"])).status_code == 201


async def test_a_version_is_never_replaced_and_the_same_picture_may_come_again(
    client: httpx.AsyncClient, bucket: Bucket
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
    assert bucket.objects() == ["cat/1.png"]
    assert bucket.read("cat/1.png") == PNG


async def test_a_picture_that_another_process_kept_meanwhile_is_not_replaced(
    client: httpx.AsyncClient, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job_registry.asset_files import AssetFiles

    upload_id = await send(client, picture(colour="blue"))
    bucket.write_elsewhere("cat/1.png", PNG)
    found = AssetFiles._sources
    answers: Iterator[list[Any]] = iter([[]])  # As another process sees the bucket just before.
    monkeypatch.setattr(AssetFiles, "_sources", lambda files: next(answers, None) or found(files))
    assert code_of(await finish(client, upload_id)) == (409, "asset_exists")
    assert bucket.read("cat/1.png") == PNG


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
    client: httpx.AsyncClient, bucket: Bucket, content: bytes, expected: tuple[int, str]
) -> None:
    presigned = await presign(client, 1)
    await write(presigned, content)  # Azure takes any size, and so do these servers of the others.
    assert code_of(await finish(client, presigned["uploadId"])) == expected
    assert bucket.objects() == []


async def test_an_upload_is_finished_at_the_place_that_its_url_is_for(
    client: httpx.AsyncClient,
) -> None:
    upload_id = await send(client, PNG)
    for unknown in (
        await finish(client, upload_id, "/assets/cat/2"),
        await finish(client, "0" * 32),
        await finish(client, "../../cat/1.png"),
    ):
        assert code_of(unknown) == (404, "upload_not_found")
    assert (await finish(client, upload_id)).status_code == 201


async def test_thumbnails_are_made_of_what_any_process_stored(
    client: httpx.AsyncClient, bucket: Bucket
) -> None:
    async def thumbnail(version: int) -> str:
        job = job_context(assets=bucket.assets)
        payload = ThumbnailCreate(asset_id="cat", version_number=version, sizes=[16])
        return (await asyncio.to_thread(render, job, payload)).thumbnails[0].path

    assert (await finish(client, await send(client, PNG))).status_code == 201
    assert await thumbnail(1) == "cat/1/16.webp"
    bucket.write_elsewhere("cat/2.png", PNG)
    assert await thumbnail(2) == "cat/2/16.webp"
    assert bucket.objects() == ["cat/1.png", "cat/1/16.webp", "cat/2.png", "cat/2/16.webp"]


async def test_a_bucket_that_is_away_is_a_503(visit: Visit, bucket: Bucket) -> None:
    async with visit(assets=f"{bucket.kind}://missing/assets") as client:
        answer = await client.post(PLACE, content=PNG, headers=of_type("image/png"))
        assert code_of(answer) == (503, "assets_unavailable")
        assert code_of(await finish(client, "0" * 32)) == (404, "upload_not_found")


async def test_presigning_needs_the_scope_to_enqueue(visit: Visit, bucket: Bucket) -> None:
    async with visit(assets=bucket.assets, **AUTH) as client:
        for scope, status in (("jobs:read", 403), ("jobs:own", 201), ("jobs:enqueue", 201)):
            answer = await client.post(
                f"{PLACE}/presign", json={"bytes": 100}, headers=bearer(scope=scope)
            )
            assert answer.status_code == status


@pytest.mark.parametrize(
    ("kind", "environment", "options"),
    [
        ("s3", {}, {"anon": True}),
        ("gs", {}, {"token": "anon"}),
        ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "user.json"}, {}),
        ("az", {"AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=1"}, {}),
        ("az", {"AZURE_STORAGE_ANON": "true"}, {}),
        ("az", {}, {}),
    ],
    ids=["s3 anonymous", "gs anonymous", "gs user", "az token", "az anonymous", "az identity"],
)
async def test_credentials_that_cannot_sign_are_told_to_the_operator(
    visit: Visit,
    clients: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    environment: dict[str, str],
    options: dict[str, Any],
) -> None:
    (tmp_path / "user.json").write_text(
        '{"type": "authorized_user", "client_id": "1", "client_secret": "1", "refresh_token": "1"}'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", AZURE_ACCOUNT)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, kind, options)
    fsspec.get_filesystem_class(kind).clear_instance_cache()
    logged = log_of_uploads(monkeypatch)
    try:
        async with visit(assets=f"{kind}://pictures") as client:
            answer = await client.post(f"{PLACE}/presign", json={"bytes": 100})
    finally:
        fsspec.get_filesystem_class(kind).clear_instance_cache()
    assert code_of(answer) == (409, "presigned_urls_missing")
    assert f"POST {PLACE}" in answer.json()["error"]["message"]
    (warning,) = logged
    assert warning["event"] == "upload.cannot_presign"
    assert "cannot sign" in warning["reason"]


PROGRAM: Final = """
import { readFile } from "node:fs/promises";
import { upload } from "./upload";

const [picture, type] = process.argv.slice(2);
await upload(new Blob([await readFile(picture)], { type }), "cat", 1);
"""


@pytest.fixture(scope="module")
def program_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, program_port: int) -> Path:
    """A program with the function of the guide, which uploads a picture."""
    skip_without_packages()
    folder = tmp_path_factory.mktemp("program")
    (shown,) = [block.text for block in blocks("client") if block.argument == "upload.ts"]
    upload = shown.replace("127.0.0.1:8000", f"127.0.0.1:{program_port}")
    (folder / "upload.ts").write_text(upload)
    (folder / "login.ts").write_text('export const token = () => "token";')
    (folder / "main.ts").write_text(PROGRAM)
    build_project(folder, ["rolldown", "main.ts", "--platform", "node", "--file", "main.mjs"])
    return folder / "main.mjs"


@pytest.mark.parametrize("in_a_folder", [False, True])
async def test_the_program_of_the_guide_uploads_to_every_storage(
    visit: Visit,
    bucket: Bucket,
    tmp_path: Path,
    program: Path,
    program_port: int,
    in_a_folder: bool,
) -> None:
    async def upload(content: bytes) -> str:
        (tmp_path / "picture").write_bytes(content)
        node = await asyncio.create_subprocess_exec(
            *("node", program, tmp_path / "picture", "image/png"), stderr=subprocess.PIPE
        )
        _, said = await node.communicate()
        assert (node.returncode == 0) == (said == b"")
        return said.decode()

    assets = str(tmp_path / "assets") if in_a_folder else bucket.assets
    async with visit(assets=assets) as client:
        application = application_of(client)
        config = uvicorn.Config(application, port=program_port, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        try:
            while not server.started:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert await upload(PNG) == ""
            assert "has another picture" in await upload(picture(colour="blue"))
            assert "The content is not of" in await upload(b"<svg/>" * 100)
        finally:
            server.should_exit = True
            await serving
    if in_a_folder:
        assert (tmp_path / "assets" / "cat" / "1.png").read_bytes() == PNG
    else:
        assert bucket.objects() == ["cat/1.png"]
        assert bucket.read("cat/1.png") == PNG
