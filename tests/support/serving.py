"""Start real servers on loopback, each in a process group of its own."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path

HERE = Path(__file__).parent
"""The folder of the apps that tests serve."""

ROOT = HERE.parents[1]
"""The repository."""

SERVERS: dict[str, list[str]] = {
    "uvicorn-httptools-uvloop": ["uvicorn", "--http=httptools", "--loop=uvloop"],
    "uvicorn-httptools-asyncio": ["uvicorn", "--http=httptools", "--loop=asyncio"],
    "uvicorn-h11-asyncio": ["uvicorn", "--http=h11", "--loop=asyncio"],
    "uvicorn-zttp": ["uvicorn", "--http=zttp"],
    "uvicorn-zttp-h2": ["uvicorn", "--http=zttp", "--http2"],
    "hypercorn-asyncio": ["hypercorn", "--worker-class=asyncio"],
    "hypercorn-trio": ["hypercorn", "--worker-class=trio"],
    "hypercorn-asyncio-h2": ["hypercorn", "--worker-class=asyncio"],
    "hypercorn-trio-h2": ["hypercorn", "--worker-class=trio"],
    "granian": ["granian", "--interface=asgi", "--no-log"],
    "granian-h2": ["granian", "--interface=asgi", "--no-log"],
    "daphne": ["daphne"],
}


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
_PORTS = cycle(random.sample(range(10_000 + _WORKER * 2_000, 12_000 + _WORKER * 2_000), 2_000))
"""Ports below the range that the kernel assigns, and a separate range for each pytest-xdist worker. A port that is free
now is therefore still free when its server starts, and when it starts again."""


def free_port() -> int:
    while True:
        port = next(_PORTS)
        with socket.socket() as sock, suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # servers set it too
            sock.bind(("127.0.0.1", port))
            return port


def command(server: str, app: str, port: int) -> list[str]:
    """Return the command line that serves `app` (``module:name``)."""
    module, *options = SERVERS[server]
    return [sys.executable, "-m", module, *options, *address(module, port), app]


def address(module: str, port: int) -> list[str]:
    """Return the options that make a server listen on `port`."""
    addresses = {"hypercorn": [f"--bind=127.0.0.1:{port}"], "daphne": ["--bind=127.0.0.1", f"--port={port}"]}
    return addresses.get(module, ["--host=127.0.0.1", f"--port={port}"])


def wait_until_open(port: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert process.poll() is None, f"the server ended with status {process.returncode}"
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.02)
        else:
            return


def read_until(sock: socket.socket, what: bytes) -> bytes:
    """Read until `what` has arrived, and return everything read."""
    data = b""
    while what not in data:
        chunk = sock.recv(65_536)
        assert chunk, data
        data += chunk
    return data


@contextmanager
def running(server: str, app: str = "apps:app", log: Path | None = None) -> Iterator[int]:
    """Serve `app` inside the block; yields the port."""
    with process(server, app, log) as (port, _):
        yield port


@contextmanager
def process(
    server: str, app: str = "apps:app", log: Path | None = None
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Serve `app` inside the block; yields the port and the process."""
    port = free_port()
    with serving(command(server, app, port), port, log) as server_process:
        yield port, server_process


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "PYTHONWARNINGS": "default"}


@contextmanager
def serving(
    arguments: list[str],
    port: int,
    log: Path | None = None,
    directory: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server's command inside the block, in `directory` and with extra environment `variables`."""
    env = {**environment(), **(variables or {})}
    with (log or Path(os.devnull)).open("ab") as output:
        server_process = subprocess.Popen(
            arguments, env=env, cwd=directory, stdout=output, stderr=output, start_new_session=True
        )
        try:
            wait_until_open(port, server_process)
            yield server_process
        finally:
            if server_process.poll() is None:
                os.killpg(server_process.pid, signal.SIGTERM)
                try:
                    server_process.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(server_process.pid, signal.SIGKILL)
                    server_process.wait(5)
