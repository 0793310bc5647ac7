"""Many connections that one loop reads, so that the cost of the client stays low."""

import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .server import Server

if TYPE_CHECKING:
    import socket


class Clients:
    """Connections to one path. Each counts its events.

    Args:
        server: The server.
        path: The path to request.
        mark: Bytes that occur once in each event.
        longest: Bytes to keep from the end of each read, for a mark that is cut; 0: one less than the mark has.
        chunk: Bytes of a read.
    """

    def __init__(self, server: Server, path: str, mark: bytes, longest: int = 0, chunk: int = 65_536) -> None:
        self.server = server
        self.path = path
        self.mark = mark
        self.longest = longest or len(mark) - 1
        self.chunk = chunk
        self.epoll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.unread: dict[int, bytes] = {}  # the end of the last read, in which a mark may have begun
        self.counts: dict[int, int] = {}
        self.received = 0  # marks on all connections
        self.heard: set[int] = set()  # connections whose response has started
        self.first: dict[int, float] = {}  # time of the first mark
        self.ended: set[int] = set()

    def add(self, number: int = 1) -> int:
        """Open more connections and return the file descriptor of the last."""
        fd = -1
        for _ in range(number):
            sock = self.server.connect(self.path)
            sock.setblocking(False)
            fd = sock.fileno()
            self.sockets[fd] = sock
            self.unread[fd] = b""
            self.counts[fd] = 0
            self.epoll.register(fd, select.EPOLLIN)
        return fd

    def run(self, until: Callable[[], bool], seconds: float) -> float:
        """Read until `until` returns true or the time is over; return the seconds that passed."""
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds and not until():
            for fd, _ in self.epoll.poll(0.05):
                self.read(fd)
        return elapsed

    def read(self, fd: int) -> None:
        try:
            data = self.sockets[fd].recv(self.chunk)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.epoll.unregister(fd)
            self.ended.add(fd)
            return
        self.heard.add(fd)
        if events := self.count(fd, self.unread[fd] + data):
            self.counts[fd] += events
            self.received += events
            self.first.setdefault(fd, time.perf_counter())

    def count(self, fd: int, data: bytes) -> int:
        """Return the number of marks in `data`, and keep the end that may hold part of another."""
        self.unread[fd] = data[-self.longest :]
        return data.count(self.mark)

    def restart(self) -> None:
        """Set the counts to 0."""
        self.counts = dict.fromkeys(self.counts, 0)
        self.received = 0

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()
        self.epoll.close()


def never() -> bool:
    return False
