"""examples/tail.py as a program, a writer of its log, and a client that is killed again and again."""

import itertools
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ROOT, free_port
from tail_log import SCRIPT, rotate

from asgi_sse import EventDecoder, ServerSentEvent


class Server:
    """The program in a process."""

    def __init__(self, log: Path, kind: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, str(SCRIPT), str(log), "--server", kind, "--port", str(self.port)]
        self._output = log.with_name("server.output")
        self.start()

    def start(self) -> None:
        with self._output.open("ab") as output:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(self._command, env=environment, stdout=output, stderr=output)

    def wait(self) -> None:
        """Wait until the port accepts connections."""
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the server did not start:\n{self.output}")
                time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    @property
    def output(self) -> str:
        return self._output.read_text()


@contextmanager
def running(log: Path, kind: str) -> Iterator[Server]:
    server = Server(log, kind)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


class Writer(threading.Thread):
    """Writes numbered lines in bursts and rotates the log, at most `AHEAD` lines ahead of its client."""

    LINES = 100_000
    AHEAD = 6_000

    def __init__(self, log: Path, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self._log = log
        self._rng = rng
        self._changed = threading.Condition()
        self._read = 0
        self._written = 0
        self.rotations = 0
        self.rotating = threading.Event()  # a rotation waits until the client is killed
        self.killed = threading.Event()
        self.settled = threading.Lock()  # held during a rotation, while there may be no file

    def set_read(self, count: int) -> None:
        with self._changed:
            self._read = count
            self._changed.notify()

    def run(self) -> None:
        file = self._log.open("ab", buffering=0)
        for burst in itertools.count(1):
            self._write(file, self._rng.randrange(500, 3000))
            if self._written == self.LINES:
                break
            if burst % 5 == 0 and self._written < self.LINES - 2000:  # a rotation needs up to 1,000 lines
                with self.settled, file as old:
                    file = self._rotate(old)
        with file:
            file.write(b"end\n")

    def _write(self, file: Any, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._written - self._read < self.AHEAD, timeout=30)
        numbers = range(self._written, min(self._written + count, self.LINES))
        data = b"".join(b"%06d %s\n" % (number, b"x" * self._rng.randrange(60)) for number in numbers)
        cut = self._rng.randrange(len(data))  # in most cases within a line
        file.write(data[:cut])
        file.write(data[cut:])
        self._written = numbers.stop

    def _rotate(self, old: Any) -> Any:
        rotate(self._log)
        self.rotations += 1
        if self.rotations % 3 == 1:  # the client is killed while there is no file
            self.killed.clear()
            self.rotating.set()
            self._write(old, 10)
            assert self.killed.wait(20)
        elif self.rotations % 3 == 2:  # the new file exists before the writer uses it
            self._log.touch()
            self._write(old, 1000)
        return self._log.open("ab", buffering=0)


class Client:
    """Reads the log, is killed again and again, and reconnects with its last event id."""

    def __init__(self, url: str, writer: Writer, rng: random.Random) -> None:
        self._url = url
        self._writer = writer
        self._rng = rng
        self._id = ""
        self.lines: list[str] = []
        self.others: list[ServerSentEvent] = []
        self.connections = 0

    def run(self, until: int, stopping: Callable[[], None] | None = None) -> None:
        """Read until the client has `until` lines. If given, call `stopping` at the last line and read to the end."""
        deadline = time.monotonic() + 60
        while len(self.lines) < until:
            assert time.monotonic() < deadline
            try:
                if self._connect(min(until, len(self.lines) + self._rng.randrange(2000, 6000)), stopping):
                    return
            except httpx.TransportError:  # the server was killed
                time.sleep(0.01)

    def _connect(self, until: int, stopping: Callable[[], None] | None) -> bool:
        headers = {"last-event-id": self._id} if self._id else {}
        decoder = EventDecoder()
        decoder.last_event_id = self._id
        with httpx.stream("GET", f"{self._url}/events?from=start", headers=headers, timeout=10) as response:
            assert response.status_code == 200
            self.connections += 1
            for chunk in response.iter_raw():
                rotating = self._writer.rotating.is_set()
                kill = rotating or (len(self.lines) >= until and self.lines[-1] != "end")
                # A killed client has read only a part of the chunk, which may end within an event.
                self._take(decoder, chunk[: self._rng.randrange(len(chunk))] if kill else chunk)
                if kill:
                    break
                if stopping is not None and self.lines[-1:] == ["end"]:
                    stopping()
                    stopping = None
            else:
                return True  # the server ended the stream properly
        if rotating:
            self._writer.rotating.clear()
            self._writer.killed.set()
        return False

    def _take(self, decoder: EventDecoder, chunk: bytes) -> None:
        for event in decoder.feed(chunk):
            (
                self.lines.append((event.data or "").split()[0])
                if event.event == "message"
                else self.others.append(event)
            )
        self._id = decoder.last_event_id
        self._writer.set_read(len(self.lines))
