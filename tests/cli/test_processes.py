"""`serve --processes` serves from several processes, which start, die and end together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from job_registry_api.cli import processes
from job_registry_api.cli.listening import listen, listen_together
from job_registry_api.settings import Settings
from job_registry_api.shutdown import FORCED
from tests.cli.test_cli import Shell
from tests.test_shutdown import GRACE, PROCESSES, SOON, Process, catalog, running, sqlite_url

__all__ = ["catalog", "sqlite_url"]


def test_the_sockets_share_the_connections_of_one_address() -> None:
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(each) for each in listen_together("127.0.0.1", 0, 2, "--port")
        ]

        def connect() -> list[int]:
            """Return how many of 64 connections each socket gets."""
            for _ in range(64):
                stack.enter_context(socket.create_connection(sockets[0].getsockname()))
            counts = []
            for each in sockets:
                each.setblocking(False)
                counts.append(0)
                with contextlib.suppress(OSError):
                    while True:
                        stack.enter_context(each.accept()[0])
                        counts[-1] += 1
            return counts

        # The second process has not started yet: nobody must wait for it
        assert connect() == [64, 0]

        # uvicorn listens when its process has started
        sockets[1].listen(2048)
        counts = connect()
        assert sum(counts) == 64
        # Each gets about half of them. By chance, one gets fewer than 8 once in a billion runs.
        assert min(counts) >= 8


def test_an_address_that_others_share_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    for others in (listen_together("127.0.0.1", 0, 2, "-"), [listen("127.0.0.1", 0, "-")]):
        port = others[0].getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            listen_together("127.0.0.1", port, 2, "--port or JOBS_PORT")
        assert ended.value.code == 1
        assert capsys.readouterr().err == (
            f"Cannot listen on 127.0.0.1:{port}: Address already in use."
            " Choose another port with --port or JOBS_PORT.\n"
        )
        for each in others:
            each.close()


def test_reload_is_refused(tmp_path: Path) -> None:
    jobs = Shell(tmp_path)
    for options, settings in (
        (["--processes", "2"], {}),
        ([], {"JOBS_SERVE_PROCESSES": "2"}),
    ):
        refused = jobs("serve", "--reload", *options, **settings)
        assert refused.returncode == 2
        assert refused.stderr == (
            "--reload restarts one process. Leave out --processes and JOBS_SERVE_PROCESSES.\n"
        )


def test_a_process_that_hangs_at_its_start_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, hanging = tmp_path / "started", tmp_path / "hanging"
    # The shell ignores the signals, and what it executes inherits that.
    hanging.write_text(f"#!/bin/sh\ntrap '' TERM USR1\ntouch {started}\nexec sleep 60\n", "utf-8")
    hanging.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setattr(processes, "KILL_SECONDS", 0.1)

    def end_once_started() -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    ending = threading.Thread(target=end_once_started)
    ending.start()
    settings = Settings(port=0, serve_processes=2, shutdown_seconds=0)
    with pytest.raises(SystemExit) as ended:
        processes.serve_in_processes(settings, worker=False)
    ending.join()
    assert ended.value.code == FORCED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "options", [pytest.param((), marks=pytest.mark.slow), ("--processes", "2")]
)
def test_a_signal_before_it_serves_ends_it_with_the_code_of_the_signal(
    tmp_path: Path, options: tuple[str, ...], number: signal.Signals
) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n"
    )
    jobs = Shell(tmp_path)
    process = jobs.start("serve", "--port", "0", *options, JOBS_CATALOG="slow")
    try:
        give_up = time.monotonic() + 30
        while not (tmp_path / "importing").exists():
            assert time.monotonic() < give_up
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    # A shell shows both as 128 and the number.
    code = 130 if number == signal.SIGINT else -signal.SIGTERM
    assert (process.returncode, out, err) == (code, "", "")


def test_a_process_that_fails_at_its_start_ends_all_though_another_still_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, program = tmp_path / "first", tmp_path / "program"
    # The first server says that it has started, the second one takes long, and the worker fails.
    program.write_text(
        f"""#!/bin/sh
        case "$3" in worker) exit 2;; esac
        [ -e {first} ] && exec sleep 30
        touch {first}
        while [ "$1" != --channel ]; do shift; done
        exec {sys.executable} -c "
import os, time
os.write($2, b'+')
time.sleep(30)"
        """,
        "utf-8",
    )
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    began = time.monotonic()
    settings = Settings(port=0, serve_processes=2, shutdown_seconds=0)
    with pytest.raises(SystemExit) as ended:
        processes.serve_in_processes(settings, worker=True)
    assert ended.value.code == 2
    assert time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["database", "catalog"])
def test_what_keeps_it_from_starting_is_said_once(
    fault: str, sqlite_url: str, catalog: Path
) -> None:
    url, code, said = sqlite_url, 2, "The job types cannot be loaded: hanging: "
    if fault == "database":
        url, code = "postgresql://u:secret@127.0.0.1:1/jobs", 1
        said = "The database is not available: "
    else:
        (catalog / "hanging.py").write_text("syntax error", "utf-8")
    process = Process(PROCESSES, url, catalog)
    try:
        assert process.popen.wait(60) == code
    finally:
        process.close()
    # Not that it serves: no process can.
    (sentence,) = process.lines
    assert sentence.startswith(said)


@contextmanager
def serving_in_processes(url: str, catalog: Path) -> Iterator[Process]:
    process = Process(PROCESSES, url, catalog, log_level="info")
    try:
        banner = process.wait_for_line("Job Registry serves")
        assert banner.endswith(" from 2 processes  (Ctrl-C ends it)\n")
        # What has been printed works at once.
        assert httpx.get(f"http://{address(process)}/healthz", timeout=5).status_code == 200
        process.wait_for_line("processes.started")
        yield process
    finally:
        process.close()


def servers(process: Process) -> list[psutil.Process]:
    """The processes that serve, without the worker."""
    children = psutil.Process(process.popen.pid).children()
    return [child for child in children if "serve" in child.cmdline()]


def connections_by_process(process: Process) -> Counter[int]:
    """How many connections each process serves, by its id."""
    return Counter(
        each.pid
        for each in servers(process)
        for connection in each.net_connections("tcp")
        if connection.status == "ESTABLISHED"
    )


def address(process: Process) -> str:
    (banner,) = (line for line in process.lines if line.startswith("Job Registry serves"))
    return banner.split("http://")[1].split("/graphql")[0]


@pytest.mark.slow
def test_all_processes_serve_and_one_that_dies_is_restarted(sqlite_url: str, catalog: Path) -> None:
    with serving_in_processes(sqlite_url, catalog) as process, contextlib.ExitStack() as stack:
        url = f"http://{address(process)}"
        clients = [stack.enter_context(httpx.Client(base_url=url, timeout=30)) for _ in range(32)]
        for client in clients:
            assert client.get("/healthz").status_code == 200
        first, second = servers(process)
        assert min(connections_by_process(process)[each.pid] for each in (first, second)) >= 4
        # A job that one process stores is run in the worker's own process.
        answer = clients[0].post("/jobs", json={"type": "quick", "payload": {}})
        assert answer.status_code == 201
        process.wait_for_line("job.succeeded")

        first.kill()
        line = json.loads(process.wait_for_line("process.ended"))
        assert (line["process"], line["process_id"], line["signal"]) == (
            "server 1",
            first.pid,
            "SIGKILL",
        )
        assert line["level"] == "error"
        # No connection waits for the new process, which starts after a pause.
        for _ in range(16):
            assert httpx.get(f"{url}/readyz", timeout=1).status_code == 200

        # Once it has started, it gets its share of connections again.
        give_up = time.monotonic() + 30
        while not connections_by_process(process).keys() - {first.pid, second.pid}:
            assert time.monotonic() < give_up
            clients.append(stack.enter_context(httpx.Client(base_url=url, timeout=1)))
            assert clients[-1].get("/healthz").status_code == 200
        assert len(servers(process)) == 2

        # However the supervisor ends, nothing is left.
        children = psutil.Process(process.popen.pid).children(recursive=True)
        process.popen.kill()
        assert psutil.wait_procs(children, timeout=GRACE + SOON)[1] == []


@pytest.mark.slow
def test_a_process_that_dies_again_before_it_serves_is_restarted(
    sqlite_url: str, catalog: Path
) -> None:
    with serving_in_processes(sqlite_url, catalog) as process:
        victim, other = servers(process)
        give_up = time.monotonic() + 40
        for deaths in (1, 2):
            victim.kill()
            while sum("process.ended" in line for line in process.lines) < deaths:
                assert time.monotonic() < give_up
                time.sleep(0.01)
            while not (started := [each for each in servers(process) if each != other]):
                assert time.monotonic() < give_up
                time.sleep(0.01)
            (victim,) = started
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(GRACE + SOON) == 0


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_counts_once(sqlite_url: str, catalog: Path) -> None:
    settings = {"shutdown_seconds": 2.0}
    with running(PROCESSES, sqlite_url, catalog, "stuck", **settings) as (process, job):
        process.wait_for_line("processes.started")
        children = psutil.Process(process.popen.pid).children(recursive=True)
        os.killpg(process.popen.pid, signal.SIGINT)
        with pytest.raises(psutil.TimeoutExpired):
            # A second signal would not wait for the job.
            psutil.Process(process.popen.pid).wait(1.5)
        assert process.popen.wait(10) == 0
        assert psutil.wait_procs(children, timeout=1)[1] == []
        assert job().attempt == 0
