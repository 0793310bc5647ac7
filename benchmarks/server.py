"""Server processes for the apps of the peers."""

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

PEERS = {  # peer -> the module it needs
    "raw": "uvicorn",
    "sse_starlette": "sse_starlette",
    "fastapi": "fastapi",
    "litestar": "litestar",
    "adapter": "asgi_sse",
    "asgi_sse": "asgi_sse",
}
CORES = sorted(os.sched_getaffinity(0))


class Server:
    """A uvicorn process on the first core that serves the app of a peer."""

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
        """Return the CPU seconds of the process so far.

        The resolution is a nanosecond. /proc counts hundredths of a second, and a fan-out can be shorter than that.
        """
        return time.clock_gettime((~self.process.pid << 3) | 2)  # the formula of clock_getcpuclockid(3)

    def memory(self) -> int:
        """Return the resident memory in bytes, without the kernel's socket buffers."""
        return int(self.about.memory_info().rss)

    def files(self) -> int:
        """Return the number of open file descriptors: the connections and a few more."""
        return int(self.about.num_fds())

    def streams(self) -> dict[str, int | None]:
        """Return the numbers of running streams and subscribers that the app reports."""
        return self.ask("/streams")

    def blocks(self) -> int:
        """Return the number of memory blocks that the server's Python has allocated, without garbage."""
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
