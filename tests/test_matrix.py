"""Every server stops at once, with streams that have no end: real processes, real signals, a row each.

A sample of the rows unless ``ASGI_SSE_MATRIX`` is ``full``.
"""

import os
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h2.connection
import httpx
import psutil
import pytest
from serving import HERE, free_port, wait_until_open

FULL = os.environ.get("ASGI_SSE_MATRIX") == "full"
STATUS_TERM, STATUS_INT = -signal.SIGTERM, 0
RETRY = re.compile(rb"retry: (\d+)\n\n\Z")


class Client:
    """Reads one stream to its end, in a thread."""

    def __init__(self, port: int, path: str, *, http2: bool = False, raw: bool = False) -> None:
        self._raw = raw  # leave the head and the chunks as they came
        self.body = bytearray()
        self.complete = False
        self.ended = 0.0
        self._first = threading.Event()
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        read = self._read_http2 if http2 else self._read_http1
        self._thread = threading.Thread(target=self._read, args=(read, f"127.0.0.1:{port}", path), daemon=True)
        self._thread.start()
        assert self._first.wait(10), "no event came"

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
            if chunk.endswith(b"0\r\n\r\n"):  # no event of ours ends so
                self.complete = True
                break
        if self._raw:
            return
        chunks = bytes(self.body).partition(b"\r\n\r\n")[2].split(b"\r\n")  # size, data, size, data, …
        self.body = bytearray(b"".join(chunks[1::2]))

    def _read_http2(self, authority: str, path: str) -> Iterator[bytes]:
        # Frames read by hand: to h2, a connection is closed as soon as a GOAWAY has come.
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

    def leave(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the stream goes on"


class Trigger:
    """Makes a server stop; `restarts` if its process goes on with new workers."""

    restarts = False

    def __call__(self, run: "Run") -> None:
        raise NotImplementedError


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
        def noticed() -> bool:  # not before the watch of the files has begun, of which uvicorn says nothing
            (run.directory / "reloaded.py").write_text(f"changed = {time.monotonic()}\n")
            return "Reloading" in run.log.read_text()

        run.wait_until(noticed, 5, "the change was not noticed")


class OneMoreRequest(Trigger):
    def __call__(self, run: "Run") -> None:
        httpx.get(f"http://127.0.0.1:{run.port}/")


TERM, INT, HUP = Signal(signal.SIGTERM), Signal(signal.SIGINT), Signal(signal.SIGHUP)


@dataclass
class Row:
    command: list[str]
    trigger: Trigger
    status: int | None = 0  # None: it may hang
    path: str = "/ticks"
    app: str = "shutdown_apps:app"
    clients: int = 1
    lifespan: bool = True
    finals: int | None = 1  # a client
    tail: bytes = b""  # what the body ends with, before the retry
    end_may_be_lost: bool = False
    within: float = 1.0
    exits: float = 2.0
    bind: list[str] = field(default_factory=lambda: ["--host=127.0.0.1", "--port={port}"])
    python: bool = False  # the command is a program of its own

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


ROWS = {
    "uvicorn httptools uvloop TERM": uvicorn("--http=httptools", "--loop=uvloop"),
    "uvicorn httptools uvloop INT": uvicorn("--http=httptools", "--loop=uvloop", trigger=INT),
    "uvicorn httptools asyncio TERM": uvicorn("--http=httptools", "--loop=asyncio"),
    "uvicorn h11 asyncio TERM": uvicorn("--http=h11", "--loop=asyncio"),
    "uvicorn h11 uvloop TERM": uvicorn("--http=h11", "--loop=uvloop"),
    "uvicorn zttp TERM": uvicorn("--http=zttp"),
    "uvicorn lifespan off TERM": uvicorn("--lifespan=off", lifespan=False),
    "uvicorn bare response TERM": uvicorn(app="shutdown_apps:bare"),
    "uvicorn Starlette TERM": uvicorn(app="shutdown_apps:starlette", lifespan=False),
    "uvicorn workers 2 TERM": uvicorn("--workers=2", status=0),
    "uvicorn workers 2 HUP": uvicorn("--workers=2", trigger=HUP, within=3),
    "uvicorn reload TERM": uvicorn("--reload", "--reload-dir={directory}", status=0),
    "uvicorn reload file change": uvicorn("--reload", "--reload-dir={directory}", trigger=FileChange(), within=3),
    "uvicorn limit_max_requests": uvicorn("--limit-max-requests=1", trigger=OneMoreRequest()),
    "uvicorn should_exit": Row(["shutdown_apps.py", "should-exit", "{port}"], Line(), python=True),
    "uvicorn in a thread": Row(["shutdown_apps.py", "thread", "{port}"], Line(), python=True),
    "hypercorn asyncio TERM": hypercorn("--worker-class=asyncio"),
    "hypercorn asyncio bare response TERM": hypercorn("--worker-class=asyncio", app="shutdown_apps:bare"),
    "hypercorn uvloop TERM": hypercorn("--worker-class=uvloop"),
    "hypercorn trio TERM": hypercorn("--worker-class=trio"),
    "hypercorn trio bare response TERM": hypercorn("--worker-class=trio", app="shutdown_apps:bare"),
    "hypercorn asyncio -w 0 TERM": hypercorn("--worker-class=asyncio", "--workers=0"),
    "hypercorn uvloop -w 0 TERM": hypercorn("--worker-class=uvloop", "--workers=0"),
    "hypercorn asyncio -w 0 INT": hypercorn("--worker-class=asyncio", "--workers=0", trigger=INT),
    "hypercorn asyncio TERM h2": hypercorn("--worker-class=asyncio", "h2"),
    # hypercorn 0.18 sends its GOAWAY as soon as the last data is taken, and on trio often before the END_STREAM, which
    # h2 then refuses to send: the client has everything but the end, until graceful_timeout cuts the connection.
    "hypercorn trio TERM h2": hypercorn("--worker-class=trio", "h2", end_may_be_lost=True, within=4, exits=5),
    "hypercorn embedded": Row(["shutdown_apps.py", "hypercorn", "{port}"], Line(), python=True),
    "granian TERM": granian(),
    "granian INT": granian(trigger=INT),
    # Its process ends when the last body has: without our lifespan, nothing waits for a clean-up.
    "granian bare response TERM": granian(app="shutdown_apps:bare", finals=None),
    "granian TERM h2": granian("h2"),
    "daphne TERM": Row(["daphne"], TERM, bind=["--bind=127.0.0.1", "--port={port}"], lifespan=False),
    "daphne INT": Row(["daphne"], INT, bind=["--bind=127.0.0.1", "--port={port}"], lifespan=False),
    "gunicorn uvicorn-worker TERM": gunicorn(TERM),
    "gunicorn uvicorn-worker HUP": gunicorn(HUP, within=3),
}


class Run:
    """One server process, with one endless stream for each of its clients."""

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
            "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
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


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[[Row], Run]]:
    with ExitStack() as stack:

        def start(row: Row) -> Run:
            run = Run(row, tmp_path)
            stack.callback(run.close)
            return run

        yield start


def check(name: str, row: Row, run: Run, clients: list[Client]) -> None:
    """Stop the server, and look at all that is promised of it."""
    began = time.monotonic()
    row.trigger(run)
    for client in clients:
        client.wait(row.within + 5)
    seen = max(client.ended for client in clients) - began
    status: Any = "goes on"
    exited = 0.0
    if not row.trigger.restarts:
        try:
            status = run.process.wait(row.exits + 2)
        except subprocess.TimeoutExpired:
            status = "hangs"
        exited = time.monotonic() - began
    log = run.log.read_text()
    complete = sum(client.complete for client in clients)
    retries = [RETRY.search(client.body) for client in clients]
    if row.finals is not None:
        run.wait_until(lambda: run.noted("finally") >= row.finals * len(clients), 2, "no finally ran")  # type: ignore[operator]
    print(
        f"{name:56} {complete}/{len(clients)} complete in {seen:4.2f} s; exit {exited:4.2f} s, status {status!s:>7}; "
        f"finally {run.noted('finally')} x; lifespan.shutdown {run.noted('lifespan.shutdown')} x"
    )
    assert complete == len(clients) or row.end_may_be_lost, (bytes(clients[0].body[-300:]), log[-3000:])
    for client, retry in zip(clients, retries, strict=True):
        assert retry is not None, client.body[-200:]
        assert 1000 <= int(retry[1]) <= 5000
        assert client.body[: retry.start()].endswith(row.tail + b"\n\n")
    assert seen < row.within
    if row.trigger.restarts:
        run.wait_until(lambda: run.noted("lifespan.shutdown") > 0, 3, "no lifespan.shutdown came")
    elif row.status is not None:
        assert status == row.status, log[-3000:]
        assert exited < row.exits
        assert run.noted("lifespan.shutdown") == row.lifespan * (2 if "--workers=2" in row.command else 1)
    if row.finals is not None:
        assert run.noted("finally") == row.finals * len(clients)
    assert run.noted("too late") == 0
    bad = [line for line in log.splitlines() if re.search(r"ERROR|Traceback|exception was never", line)]
    assert not bad, log[-3000:]


SAMPLE = [
    "uvicorn httptools uvloop TERM", "uvicorn h11 asyncio TERM", "uvicorn bare response TERM", "uvicorn in a thread",
    "uvicorn limit_max_requests", "uvicorn workers 2 TERM", "hypercorn asyncio TERM", "hypercorn trio TERM",
    "hypercorn asyncio TERM h2", "hypercorn asyncio -w 0 TERM", "granian TERM", "daphne TERM",
    "gunicorn uvicorn-worker TERM",
]  # fmt: skip


@pytest.mark.parametrize("name", list(ROWS) if FULL else SAMPLE)
def test_every_server_stops(name: str, runs: Callable[[Row], Run]) -> None:
    row = ROWS[name]
    run = runs(row)
    clients = [Client(run.port, row.path, http2=row.http2) for _ in range(row.clients)]
    check(name, row, run, clients)


SERVERS = {
    "uvicorn": uvicorn("--http=httptools", "--loop=uvloop"),
    "hypercorn": hypercorn("--worker-class=asyncio"),
    "hypercorn trio": hypercorn("--worker-class=trio"),
    "granian": granian(),
}
HOSTILE: dict[str, dict[str, Any]] = {
    "never suspends": {"path": "/flat-out"},
    "swallows its cancellation once": {"path": "/swallows-once"},
    "cleans up for 5 s, with 1 s to go": {"path": "/slow-clean-up", "exits": 3.0},
    "is a thread that is blocked": {"path": "/blocked-thread", "finals": None},
    "says farewell": {"path": "/farewell", "tail": b"event: farewell\ndata: farewell"},
    "swallows it for ever": {"path": "/swallows-for-ever", "finals": None, "status": None},
}
HOSTILE_SAMPLE = [("uvicorn", "cleans up for 5 s, with 1 s to go"), ("hypercorn", "says farewell")]


@pytest.mark.parametrize(
    ("server", "source"), [(server, source) for server in SERVERS for source in HOSTILE] if FULL else HOSTILE_SAMPLE
)
def test_whatever_the_source_does(server: str, source: str, runs: Callable[[Row], Run]) -> None:
    row = replace(SERVERS[server], **HOSTILE[source])
    run = runs(row)
    check(f"{server}: a source that {source}", row, run, [Client(run.port, row.path)])


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn"] if FULL else ["uvicorn"])
def test_a_client_that_does_not_read(server: str, runs: Callable[[Row], Run]) -> None:
    row = replace(SERVERS[server], exits=3.0, finals=None)
    run = runs(row)
    with socket.create_connection(("127.0.0.1", run.port)) as stuck:
        stuck.sendall(b"GET /flat-out HTTP/1.1\r\nHost: x\r\n\r\n")
        client = Client(run.port, row.path)
        time.sleep(1)  # until the socket's buffers are full; there is nothing to wait for
        check(f"{server}: a client that does not read", row, run, [client])
        assert run.noted("finally") == 2


@pytest.mark.parametrize("app", ["shutdown_apps:app", "shutdown_apps:sse_starlette"] if FULL else ["shutdown_apps:app"])
def test_a_thousand_streams(app: str, runs: Callable[[Row], Run]) -> None:
    """Beside sse-starlette, in the same run."""
    count = 1000
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ours = app == "shutdown_apps:app"
    run = runs(replace(SERVERS["uvicorn"], app=app))
    bodies: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector, ExitStack() as sockets:

        def read(until: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 30
            while not until():
                assert time.monotonic() < deadline
                for key, _ in selector.select(1):
                    sock: Any = key.fileobj
                    if data := sock.recv(65_536):
                        bodies[sock] += data
                    else:
                        selector.unregister(sock)

        for _ in range(count):
            sock = sockets.enter_context(socket.create_connection(("127.0.0.1", run.port)))
            sock.sendall(b"GET /idle HTTP/1.1\r\nHost: x\r\n\r\n")
            selector.register(sock, selectors.EVENT_READ)
            bodies[sock] = b""
        read(lambda: all(b"data: first" in body for body in bodies.values()))
        began = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        read(lambda: not selector.get_map())
        seen = time.monotonic() - began
        status = run.process.wait(10)
        exited = time.monotonic() - began
    complete = sum(body.endswith(b"0\r\n\r\n") for body in bodies.values())
    name = f"uvicorn: {count} streams of {'asgi_sse' if ours else 'sse-starlette'}"
    print(f"{name:56} {complete} complete in {seen:4.2f} s; exit {exited:4.2f} s, status {status}")
    if ours:
        assert (complete, status) == (count, STATUS_TERM)
        retries = {match[1] for body in bodies.values() if (match := re.search(rb"retry: (\d+)\n\n\r\n0\r", body))}
        assert len(retries) > count / 4  # spread, so that they do not all return at once
        assert run.noted("finally") == count


def test_a_second_interrupt_forces_the_server_out(runs: Callable[[Row], Run]) -> None:
    run = runs(uvicorn(app="shutdown_apps:patient"))
    client = Client(run.port, "/long-farewell")
    run.process.send_signal(signal.SIGINT)
    run.wait_until(lambda: "Waiting for" in run.log.read_text(), 3, "uvicorn does not wait")
    time.sleep(0.5)  # uvicorn 0.54 hangs, with any app, if the second one comes in the very turn of its wait
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    run.process.wait(5)
    assert time.monotonic() - began < 2
    client.wait(1)
    assert not client.complete
