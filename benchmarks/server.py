"""A peer's app, as a process of its own."""

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PEERS = {  # and the package of each
    "raw": "uvicorn",
    "sse_starlette": "sse_starlette",
    "fastapi": "fastapi",
    "litestar": "litestar",
    "adapter": "asgi_sse",
    "asgi_sse": "asgi_sse",
}
CORES = sorted(os.sched_getaffinity(0))


class Server:
    """A peer's app under uvicorn, on the first core."""

    def __init__(self, peer: str, ping: float = 15.0) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        command = [sys.executable, "-m", "uvicorn", "--factory", f"benchmarks.apps:{peer}"]
        options = [f"--port={self.port}", "--log-level=critical", "--no-access-log", "--backlog=4096"]
        self.process = subprocess.Popen(
            [*command, *options],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"BENCHMARKS_PING": str(ping)},
            stdin=subprocess.DEVNULL,
        )
        os.sched_setaffinity(self.process.pid, CORES[:1])
        self.about = psutil.Process(self.process.pid)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.connect("/idle").close()
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.stop()
                    raise
                time.sleep(0.05)

    def connect(self, path: str) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n".encode())
        return sock

    def cpu(self) -> float:
        """Seconds, to the nanosecond: /proc counts in hundredths, in which a fan-out may be over."""
        return time.clock_gettime((~self.process.pid << 3) | 2)  # as clock_getcpuclockid(3) does

    def memory(self) -> int:
        """Bytes that are resident. What the kernel keeps for its sockets is not among them."""
        return int(self.about.memory_info().rss)

    def files(self) -> int:
        """Open file descriptors: its connections, and a few more."""
        return int(self.about.num_fds())

    def streams(self) -> dict[str, int | None]:
        """How many it knows of itself: running streams, and subscribers."""
        return self.ask("/streams")

    def blocks(self) -> int:
        """Blocks of memory that its Python has taken, without garbage."""
        return self.ask("/streams?blocks")["blocks"] or 0

    def ask(self, path: str) -> dict[str, int | None]:
        with self.connect(path) as sock:
            answer = b""
            while data := sock.recv(65_536):
                answer += data
                if b"}" in data:
                    break
        answered: dict[str, int | None] = json.loads(answer[answer.index(b"{") : answer.index(b"}") + 1])
        return answered

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(peer: str, ping: float = 15.0) -> Iterator[Server]:
    server = Server(peer, ping)
    try:
        yield server
    finally:
        server.stop()


def cpu_of_this_process() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
