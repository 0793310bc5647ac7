"""Every server stops at once while endless streams are open: real processes, real signals, one row each.

``ASGI_SSE_MATRIX=full`` runs all rows; otherwise a sample runs.
"""

import re
import resource
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stopping import (
    FULL,
    HUP,
    INT,
    STATUS_TERM,
    TERM,
    Client,
    FileChange,
    Line,
    OneMoreRequest,
    Row,
    Run,
    check,
    granian,
    gunicorn,
    hypercorn,
    starting,
    uvicorn,
)

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
    # hypercorn 0.18 sends its GOAWAY as soon as the last data is taken. On trio that is often before the END_STREAM,
    # which h2 then refuses to send. The client has everything but the end until graceful_timeout cuts the connection.
    "hypercorn trio TERM h2": hypercorn("--worker-class=trio", "h2", end_may_be_lost=True, within=4, exits=5),
    "hypercorn embedded": Row(["shutdown_apps.py", "hypercorn", "{port}"], Line(), python=True),
    "granian TERM": granian(),
    "granian INT": granian(trigger=INT),
    # granian exits after the last body. Without our lifespan nothing waits for the source's clean-up.
    "granian bare response TERM": granian(app="shutdown_apps:bare", finals=None),
    "granian TERM h2": granian("h2"),
    "daphne TERM": Row(["daphne"], TERM, bind=["--bind=127.0.0.1", "--port={port}"], lifespan=False),
    "daphne INT": Row(["daphne"], INT, bind=["--bind=127.0.0.1", "--port={port}"], lifespan=False),
    "gunicorn uvicorn-worker TERM": gunicorn(TERM),
    "gunicorn uvicorn-worker HUP": gunicorn(HUP, within=3),
}


SAMPLE = [
    "uvicorn httptools uvloop TERM", "uvicorn h11 asyncio TERM", "uvicorn bare response TERM", "uvicorn in a thread",
    "uvicorn limit_max_requests", "uvicorn workers 2 TERM", "hypercorn asyncio TERM", "hypercorn trio TERM",
    "hypercorn asyncio TERM h2", "hypercorn asyncio -w 0 TERM", "granian TERM", "daphne TERM",
    "gunicorn uvicorn-worker TERM",
]  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[[Row], Run]]:
    with starting(tmp_path) as start:
        yield start


@pytest.mark.parametrize("name", list(ROWS) if FULL else SAMPLE)
def test_server_stops_with_open_streams(name: str, runs: Callable[[Row], Run]) -> None:
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
    "cleans up for 5 s, with 1 s left": {"path": "/slow-clean-up", "exits": 3.0},
    "blocks its thread": {"path": "/blocked-thread", "finals": None},
    "sends a last event": {"path": "/farewell", "tail": b"event: farewell\ndata: farewell"},
    "swallows every cancellation": {"path": "/swallows-for-ever", "finals": None, "status": None},
}
HOSTILE_SAMPLE = [("uvicorn", "cleans up for 5 s, with 1 s left"), ("hypercorn", "sends a last event")]


@pytest.mark.parametrize(
    ("server", "source"), [(server, source) for server in SERVERS for source in HOSTILE] if FULL else HOSTILE_SAMPLE
)
def test_server_stops_despite_a_hostile_source(server: str, source: str, runs: Callable[[Row], Run]) -> None:
    row = replace(SERVERS[server], app="shutdown_apps:hasty", **HOSTILE[source])
    run = runs(row)
    check(f"{server}: a source that {source}", row, run, [Client(run.port, row.path)])


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn"] if FULL else ["uvicorn"])
def test_server_stops_despite_a_client_that_does_not_read(server: str, runs: Callable[[Row], Run]) -> None:
    row = replace(SERVERS[server], app="shutdown_apps:hasty", exits=3.0, finals=None)
    run = runs(row)
    with socket.create_connection(("127.0.0.1", run.port)) as stuck:
        stuck.sendall(b"GET /flat-out HTTP/1.1\r\nHost: x\r\n\r\n")
        client = Client(run.port, row.path)
        stuck.recv(1)  # its stream has started
        time.sleep(1)  # let the socket buffers fill; no event marks that moment
        check(f"{server}: a client that does not read", row, run, [client])
        assert run.noted("finally") == 2


@pytest.mark.parametrize("app", ["shutdown_apps:app", "shutdown_apps:sse_starlette"] if FULL else ["shutdown_apps:app"])
def test_server_stops_with_a_thousand_streams(app: str, runs: Callable[[Row], Run]) -> None:
    """In full, sse-starlette runs beside it."""
    count = 1000
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ours = app == "shutdown_apps:app"
    run = runs(replace(SERVERS["uvicorn"], app=app))
    bodies: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector, ExitStack() as sockets:

        def read(until: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 60
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
        status = run.process.wait(60)
        exited = time.monotonic() - began
    complete = sum(body.endswith(b"0\r\n\r\n") for body in bodies.values())
    name = f"uvicorn: {count} streams of {'asgi_sse' if ours else 'sse-starlette'}"
    print(f"{name:56} {complete} complete in {seen:4.2f} s; exit {exited:4.2f} s, status {status}")
    if ours:
        assert (complete, status) == (count, STATUS_TERM)
        retries = {match[1] for body in bodies.values() if (match := re.search(rb"retry: (\d+)\n\n\r\n0\r", body))}
        assert len(retries) > count / 4  # spread, so that clients do not all reconnect at once
        assert run.noted("finally") == count


def test_second_interrupt_forces_the_server_to_exit(runs: Callable[[Row], Run]) -> None:
    run = runs(uvicorn(app="shutdown_apps:long_drain"))
    client = Client(run.port, "/long-farewell")
    run.process.send_signal(signal.SIGINT)
    run.wait_until(lambda: "Waiting for" in run.log.read_text(), 60, "uvicorn is not waiting")
    time.sleep(
        0.5
    )  # uvicorn 0.54 hangs with any app if the second signal arrives in the turn in which it starts to wait
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    run.process.wait(60)
    assert time.monotonic() - began < 30  # of the 60 s that its source would take
    client.wait(60)
    assert not client.complete
