"""Stop a real server with endless streams, and check what its clients, sources and log saw."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h2.connection
import httpx
import psutil
from serving import HERE, ROOT, free_port, wait_until_open

STATUS_TERM, STATUS_INT = -signal.SIGTERM, 0
FULL = os.environ.get("ASGI_SSE_MATRIX") == "full"
SLOWNESS = 1 if FULL else 4
"""How many times slower than a row allows the machine may be while other tests run. The result stays below the
``drain_timeout`` of the apps. For a ``hasty`` app, the notes show what was waited for."""
RETRY = re.compile(rb"retry: (\d+)\n\n\Z")


class Client:
    """Reads one stream to its end in a thread."""

    def __init__(self, port: int, path: str, *, http2: bool = False, raw: bool = False) -> None:
        self._raw = raw  # keep the response headers and the chunk framing
        self.body = bytearray()
        self.complete = False
        self.ended = 0.0
        self._first = threading.Event()
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        read = self._read_http2 if http2 else self._read_http1
        self._thread = threading.Thread(target=self._read, args=(read, f"127.0.0.1:{port}", path), daemon=True)
        self._thread.start()
        assert self._first.wait(60), "no event arrived"

    def _read(self, read: Callable[[str, str], Iterator[bytes]], authority: str, path: str) -> None:
        with self._sock, suppress(OSError):
            for chunk in read(authority, path):
                self.body += chunk
                if not self._first.is_set() and b"data: " in self.body:
                    self._first.set()
        self.ended = time.monotonic()

    def _read_http1(self, authority: str, path: str) -> Iterator[bytes]:
        self._sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
        while chunk := self._sock.recv(262_144):
            yield chunk
            if self.body.endswith(b"0\r\n\r\n"):  # no event in these tests ends like that
                self.complete = True
                break
        if self._raw:
            return
        chunks = bytes(self.body).partition(b"\r\n\r\n")[2].split(b"\r\n")  # size, data, size, data, …
        self.body = bytearray(b"".join(chunks[1::2]))

    def _read_http2(self, authority: str, path: str) -> Iterator[bytes]:
        # Read the frames by hand, since h2 closes the connection at the first GOAWAY.
        http = h2.connection.H2Connection()
        http.initiate_connection()
        http.send_headers(
            1, [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", authority)], end_stream=True
        )
        self._sock.sendall(http.data_to_send())
        with self._sock.makefile("rb") as file:
            while header := file.read(9):
                payload = file.read(int.from_bytes(header[:3]))
                kind, flags, stream = header[3], header[4], int.from_bytes(header[5:])
                if (kind, stream) == (0, 1):  # DATA
                    yield payload
                    if flags & 1:  # END_STREAM
                        self.complete = True
                        return

    def disconnect(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the stream is still open"


class Trigger(ABC):
    """Makes a server stop. `restarts` says that its process continues with new workers."""

    restarts = False

    @abstractmethod
    def __call__(self, run: "Run") -> None: ...


class Signal(Trigger):
    def __init__(self, number: signal.Signals) -> None:
        self.number = number
        self.restarts = number is signal.SIGHUP

    def __call__(self, run: "Run") -> None:
        run.process.send_signal(self.number)


class Line(Trigger):
    def __call__(self, run: "Run") -> None:
        assert run.process.stdin is not None
        run.process.stdin.write(b"\n")
        run.process.stdin.flush()


class FileChange(Trigger):
    restarts = True

    def __call__(self, run: "Run") -> None:
        def noticed() -> bool:  # write until uvicorn watches, since it does not say when it starts watching
            (run.directory / "reloaded.py").write_text(f"changed = {time.monotonic()}\n")
            return "Reloading" in run.log.read_text()

        run.wait_until(noticed, 60, "uvicorn did not notice the change")


class OneMoreRequest(Trigger):
    def __call__(self, run: "Run") -> None:
        httpx.get(f"http://127.0.0.1:{run.port}/", timeout=60)


TERM, INT, HUP = Signal(signal.SIGTERM), Signal(signal.SIGINT), Signal(signal.SIGHUP)


@dataclass
class Row:
    command: list[str]
    trigger: Trigger
    status: int | None = 0  # None: the server may hang
    path: str = "/ticks"
    app: str = "shutdown_apps:app"
    clients: int = 1
    lifespan: bool = True
    finals: int | None = 1  # per client
    tail: bytes = b""  # the body ends with this, before the reconnection time
    end_may_be_lost: bool = False
    within: float = 1.0
    exits: float = 2.0
    bind: list[str] = field(default_factory=lambda: ["--host=127.0.0.1", "--port={port}"])
    python: bool = False  # the command is a Python file

    @property
    def http2(self) -> bool:
        return self.command[-1] == "h2"


HYPERCORN_BIND = ["--bind=127.0.0.1:{port}"]


def uvicorn(*options: str, trigger: Trigger = TERM, **more: Any) -> Row:
    if "status" not in more:
        more["status"] = STATUS_TERM if trigger is TERM else 0
    return Row(["uvicorn", *options], trigger, **more)


def hypercorn(*options: str, trigger: Trigger = TERM, **more: Any) -> Row:
    return Row(["hypercorn", *options], trigger, bind=HYPERCORN_BIND, **more)


def granian(*options: str, trigger: Trigger = TERM, **more: Any) -> Row:
    return Row(["granian", "--interface=asgi", *options], trigger, **more)


def gunicorn(trigger: Trigger, **more: Any) -> Row:
    command = ["gunicorn", "--worker-class=uvicorn_worker.UvicornWorker", "--graceful-timeout=5"]
    return Row(command, trigger, bind=HYPERCORN_BIND, **more)


class Run:
    """One server process with one endless stream per client."""

    def __init__(self, row: Row, directory: Path, *, stuck: int = 0) -> None:
        self.row = row
        self.directory = directory
        self.port = free_port()
        self.log = directory / "server.log"
        self.notes = directory / "notes"
        self.notes.touch()
        values = {"port": self.port, "directory": directory}
        command = [part.format(**values) for part in row.command if part != "h2"]
        if row.python:
            command = [sys.executable, str(HERE / command[0]), *command[1:]]
        else:
            command = [sys.executable, "-m", *command, *(part.format(**values) for part in row.bind), row.app]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
            "SHUTDOWN_LOG": str(self.notes),
            "PYTHONUNBUFFERED": "1",
        }
        self._output = self.log.open("wb")
        self.process = subprocess.Popen(
            command, env=environment, cwd=directory, stdin=subprocess.PIPE, stdout=self._output, stderr=self._output,
            start_new_session=True,
        )  # fmt: skip
        wait_until_open(self.port, self.process)

    def close(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._output.close()

    def noted(self, what: str) -> int:
        return self.notes.read_text().splitlines().count(what)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.01)


def check(name: str, row: Row, run: Run, clients: list[Client]) -> None:
    """Stop the server and check everything that the library promises about a stop."""
    began = time.monotonic()
    row.trigger(run)
    for client in clients:
        client.wait(row.within + 60)
    seen = max(client.ended for client in clients) - began
    within, exits = row.within * SLOWNESS, row.exits * SLOWNESS
    status: Any = "running"
    exited = 0.0
    if not row.trigger.restarts:
        try:
            status = run.process.wait(exits + 2)
        except subprocess.TimeoutExpired:
            status = "hangs"
        exited = time.monotonic() - began
    log = run.log.read_text()
    complete = sum(client.complete for client in clients)
    retries = [RETRY.search(client.body) for client in clients]
    if row.finals is not None:
        run.wait_until(lambda: run.noted("finally") >= row.finals * len(clients), 60, "no finally block ran")  # type: ignore[operator]
    print(
        f"{name:56} {complete}/{len(clients)} complete in {seen:4.2f} s; exit {exited:4.2f} s, status {status!s:>7}; "
        f"finally {run.noted('finally')} x; lifespan.shutdown {run.noted('lifespan.shutdown')} x"
    )
    assert complete == len(clients) or row.end_may_be_lost, (bytes(clients[0].body[-300:]), log[-3000:])
    for client, retry in zip(clients, retries, strict=True):
        assert retry is not None, client.body[-200:]
        assert 1000 <= int(retry[1]) <= 5000
        assert client.body[: retry.start()].endswith(row.tail + b"\n\n")
    assert seen < within
    if row.trigger.restarts:
        run.wait_until(lambda: run.noted("lifespan.shutdown") > 0, 60, "lifespan.shutdown did not arrive")
    elif row.status is not None:
        assert status == row.status, log[-3000:]
        assert exited < exits
        assert run.noted("lifespan.shutdown") == row.lifespan * (2 if "--workers=2" in row.command else 1)
    if row.finals is not None:
        assert run.noted("finally") == row.finals * len(clients)
    assert run.noted("too late") == 0
    bad = [line for line in log.splitlines() if re.search(r"ERROR|Traceback|exception was never", line)]
    assert not bad, log[-3000:]


@contextmanager
def starting(directory: Path) -> Iterator[Callable[[Row], Run]]:
    """Yield a function that starts the server of a row. All servers end with the block."""
    with ExitStack() as stack:

        def start(row: Row) -> Run:
            run = Run(row, directory)
            stack.callback(run.close)
            return run

        yield start
