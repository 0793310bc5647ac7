"""Many connections, read in one loop over all of them, lest they be what is measured."""

import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .server import Server

if TYPE_CHECKING:
    import socket


class Clients:
    """Connections that read one path, and how often each of them has seen a mark.

    Args:
        server: Whom they ask.
        path: For what.
        mark: Bytes of which there is one in each event.
        longest: Bytes of an event that have to be there to count it; so many of the end of each read are kept.
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
        self.unread: dict[int, bytes] = {}  # the end of what was read last, where a mark may have begun
        self.counts: dict[int, int] = {}
        self.received = 0  # marks, of all
        self.heard: set[int] = set()  # whose response has begun
        self.first: dict[int, float] = {}  # when each had its first mark
        self.ended: set[int] = set()

    def add(self, number: int = 1) -> int:
        """Connect so many more. Gives the last of them."""
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
        """Read until the condition holds, or for so many seconds. Gives how long it was."""
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
        """The marks in it; keeps what may become one."""
        self.unread[fd] = data[-self.longest :]
        return data.count(self.mark)

    def restart(self) -> None:
        """Count from 0."""
        self.counts = dict.fromkeys(self.counts, 0)
        self.received = 0

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()
        self.epoll.close()


def never() -> bool:
    return False
