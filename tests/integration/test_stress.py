"""Streams under stress on real servers: connections leave nothing behind, and stuck clients cost little memory.

``ASGI_SSE_STRESS=full`` runs the full size; otherwise a sample runs.
"""

import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from serving import process, read_until, running

from asgi_sse import EventDecoder

FULL = os.environ.get("ASGI_SSE_STRESS") == "full"
CYCLES = 10_000 if FULL else 1_000
LEFT = ("streams", "tasks", "threads", "generators")
SERVERS = ["uvicorn-httptools-uvloop", "uvicorn-h11-asyncio", "hypercorn-asyncio", "granian"]


def request(port: int, path: str) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=60)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    return sock


def figures(port: int) -> Any:
    with request(port, "/figures") as sock:
        data = read_until(sock, b'"closed"')
        while chunk := sock.recv(65_536):
            data += chunk
    (line,) = [line for line in data.splitlines() if line.startswith(b"data: ")]
    (event,) = EventDecoder().feed(line + b"\n\n")
    return json.loads(str(event.data))


def wait_until(seconds: float, condition: Any, message: Any = lambda: "it takes too long") -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, message()
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.mark.parametrize("server", SERVERS if FULL else SERVERS[:1])
def test_connections_leave_nothing_behind(server: str) -> None:
    with running(server) as port:
        for path in ("/idle?name=warm-up", "/threaded-idle"):
            request(port, path).close()
        wait_until(60, lambda: figures(port)["streams"] == 1)
        before = figures(port)
        began = time.monotonic()
        for number in range(CYCLES):
            sock = request(port, "/threaded-idle" if number % 10 == 0 else f"/idle?name={number}")
            if number % 3:
                read_until(sock, b"data: first")
            if number % 2:  # a reset, as from a killed client
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        seconds = time.monotonic() - began
        after = before

        def nothing_left() -> bool:
            nonlocal after
            after = figures(port)
            return all(after[name] <= before[name] for name in LEFT)

        wait_until(9, nothing_left, lambda: (before, after))
        print(f"{server}: {CYCLES} connections in {seconds:.1f} s; before {before}, after {after}")


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("server", SERVERS[:2] if FULL else SERVERS[:1])
def test_clients_that_stop_reading_are_dropped(server: str, clients: ExitStack) -> None:
    """50 clients, each with 20 MB to read. All are still connected when the server stops."""
    with process(server) as (port, running_process):
        about = psutil.Process(running_process.pid)
        with request(port, "/backlog") as sock:  # the first request of a process costs extra memory
            read_until(sock, b"data: x")
        wait_until(60, lambda: figures(port)["streams"] == 1)
        before = about.memory_info().rss
        for _ in range(50):
            clients.enter_context(request(port, "/backlog"))

        def all_connected() -> bool:  # on a slow machine, some are dropped before the last one connects
            now = figures(port)
            return bool(now["streams"] - 1 + now["closed"].get("timed_out", 0) == 50)

        wait_until(60, all_connected)
        peak = 0

        def all_dropped() -> bool:
            nonlocal peak
            peak = max(peak, about.memory_info().rss)
            return bool(figures(port)["streams"] == 1)

        seconds = wait_until(60, all_dropped)
        closed = figures(port)["closed"]
        began = time.monotonic()
        running_process.send_signal(signal.SIGTERM)
        running_process.wait(60)
        ended = time.monotonic() - began
    growth = (peak - before) / 2**20
    print(
        f"{server}: {growth:.1f} MB more; dropped within {seconds:.1f} s: {closed}; the server ended in {ended:.2f} s"
    )
    assert growth < 20
    assert closed["timed_out"] == 50
    assert ended < (2 if FULL else 8)  # no client holds it up; a drain would take 10 s
