"""One channel and many subscribers: what each of them receives, and when."""

import re
import select
import socket
import statistics
import time
from collections.abc import Callable, Iterable

from .server import Server, cpu_of_this_process, serving

SUBSCRIBERS = 1000
IDLE_SUBSCRIBERS = 2000
FAN_EVENTS = 200
FAN_ROUNDS = 3
PACE = 10, 5  # events a second, seconds
STORM = 200, 5
SAMPLE = 10  # one subscriber of so many tells when its events came
PATIENCE = 120.0  # seconds; what is not delivered then is not counted

EVENT = b'data: {"number": '
TIMED_EVENT = re.compile(EVENT + rb'(\d+), "sent": (\d+),')
LONGEST = 80  # bytes that are part of one of the two


class Subscribers:
    """Clients of ``/news``, in one loop over all of them, lest they be what is measured."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.epoll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.unread: dict[int, bytes] = {}  # the end of what was read last, where an event may have begun
        self.timed: set[int] = set()
        self.counts: dict[int, int] = {}
        self.received = 0  # events, of all
        self.heard: set[int] = set()  # whose response has begun
        self.delays: list[float] = []  # milliseconds, of those that are timed
        self.published: dict[int, int] = {}  # nanoseconds, by the event's number

    def subscribe(self, number: int) -> None:
        for _ in range(number):
            sock = self.server.connect("/news")
            sock.setblocking(False)
            fd = sock.fileno()
            if len(self.sockets) % SAMPLE == 0:
                self.timed.add(fd)
            self.sockets[fd] = sock
            self.unread[fd] = b""
            self.counts[fd] = 0
            self.epoll.register(fd, select.EPOLLIN)
        self.run(lambda: len(self.heard) == len(self.sockets), 60)
        # Of some peers a response begins before it has subscribed. Who has the first event has done both.
        for _ in range(20):
            self.publish(1)
            self.run(lambda: all(self.counts.values()), 1)
            if all(self.counts.values()):
                break
        self.run(never, 0.3)
        self.restart()

    def restart(self) -> None:
        """Count from 0."""
        self.counts = dict.fromkeys(self.counts, 0)
        self.received = 0
        self.delays = []
        self.published = {}

    def publish(self, count: int, rate: float = 0, pad: int = 0) -> None:
        self.server.connect(f"/publish?count={count}&rate={rate}&pad={pad}").close()

    def run(self, until: Callable[[], bool], seconds: float) -> float:
        """Read until the condition holds, or for so many seconds. Gives how long it was."""
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds and not until():
            for fd, _ in self.epoll.poll(0.05):
                self.read(fd)
        return elapsed

    def read(self, fd: int) -> None:
        try:
            data = self.sockets[fd].recv(65_536)
        except OSError:
            data = b""
        if not data:
            self.epoll.unregister(fd)
            return
        self.heard.add(fd)
        data = self.unread[fd] + data
        if fd in self.timed:
            now = time.monotonic_ns()
            found = list(TIMED_EVENT.finditer(data))
            for one in found:
                sent = int(one[2])
                self.published[int(one[1])] = sent
                self.delays.append((now - sent) / 1e6)
            events = len(found)
            self.unread[fd] = data[found[-1].end() if found else 0 :][-LONGEST:]
        else:
            events = data.count(EVENT)
            self.unread[fd] = data[1 - len(EVENT) :]
        self.counts[fd] += events
        self.received += events

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()
        self.epoll.close()


def never() -> bool:
    return False


def delivered(subscribers: Subscribers, count: int, rate: float = 0) -> dict[str, float]:
    """What it costs that everyone has so many events."""
    expected = count * len(subscribers.sockets)
    subscribers.restart()
    server_cpu, client_cpu = subscribers.server.cpu(), cpu_of_this_process()
    subscribers.publish(count, rate)
    seconds = subscribers.run(lambda: subscribers.received >= expected, PATIENCE)
    client_cpu = cpu_of_this_process() - client_cpu
    server_cpu = subscribers.server.cpu() - server_cpu
    return {
        "us/delivery": server_cpu * 1e6 / max(subscribers.received, 1),
        "seconds": seconds,
        "delivered": subscribers.received,
        "delivered %": 100 * subscribers.received / expected,
        "server CPU %": 100 * server_cpu / seconds,
        "client CPU %": 100 * client_cpu / seconds,
    }


def late(subscribers: Subscribers, rate: float) -> float:
    """Milliseconds that an event was published behind its schedule, at the most."""
    first = min(subscribers.published.items(), default=(0, 0))
    due = ((sent - first[1]) / 1e6 - (number - first[0]) * 1e3 / rate for number, sent in subscribers.published.items())
    return max(due, default=0.0)


def delays(subscribers: Subscribers) -> dict[str, float]:
    """How long events took, in milliseconds."""
    ordered = sorted(subscribers.delays) or [float("inf")]
    return {
        "p50 ms": ordered[len(ordered) // 2],
        "p99 ms": ordered[len(ordered) * 99 // 100],
        "max ms": ordered[-1],
    }


def chosen(figures: dict[str, float], names: Iterable[str]) -> dict[str, float]:
    return {name: figures[name] for name in names}


def fan(peer: str) -> dict[str, float]:
    """1,000 subscribers, 200 events published in one go; the median of three."""
    with serving(peer) as server:
        subscribers = Subscribers(server)
        subscribers.subscribe(SUBSCRIBERS)
        rounds = [delivered(subscribers, FAN_EVENTS) for _ in range(FAN_ROUNDS)]
        subscribers.close()
        columns = "us/delivery", "seconds", "server CPU %", "client CPU %"
        figures = {column: statistics.median(one[column] for one in rounds) for column in columns}
        figures["delivered"] = min(one["delivered"] for one in rounds)
        return chosen(figures, ("us/delivery", "seconds", "delivered", "server CPU %", "client CPU %"))


def timed(peer: str, rate: float, seconds: int, *, stuck: bool = False) -> dict[str, float]:
    with serving(peer) as server:
        idler = never_reading(server) if stuck else None
        subscribers = Subscribers(server)
        subscribers.subscribe(SUBSCRIBERS)
        figures = delivered(subscribers, round(rate * seconds), rate)
        figures |= delays(subscribers)
        figures["late ms"] = late(subscribers, rate)
        subscribers.close()
        if idler is not None:
            idler.close()
        return figures


def never_reading(server: Server) -> socket.socket:
    """A subscriber that takes nothing, whose send waits already: it was sent more than any socket holds."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(b"GET /news HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n")
    time.sleep(0.5)
    others = Subscribers(server)
    others.publish(900, pad=10_000)
    time.sleep(0.5)
    others.close()
    return sock


def pace(peer: str) -> dict[str, float]:
    """1,000 subscribers, 10 events a second for 5 seconds."""
    figures = timed(peer, *PACE)
    return chosen(figures, ("us/delivery", "p50 ms", "p99 ms", "delivered %", "server CPU %", "client CPU %"))


def storm(peer: str, *, stuck: bool = False) -> dict[str, float]:
    """1,000 subscribers, 200 events a second for 5 seconds."""
    figures = timed(peer, *STORM, stuck=stuck)
    columns = "us/delivery", "p50 ms", "p99 ms", "max ms", "late ms", "delivered %", "seconds", "server CPU %"
    return chosen(figures, (*columns, "client CPU %"))


def idle_sub(peer: str) -> dict[str, float]:
    """Memory of a server whose subscribers have had one event."""
    with serving(peer) as server:
        first, rest = Subscribers(server), Subscribers(server)
        first.subscribe(20)
        before = server.about.memory_info().rss
        rest.subscribe(IDLE_SUBSCRIBERS)
        figures = {
            "KiB/subscriber": (server.about.memory_info().rss - before) / IDLE_SUBSCRIBERS / 1024,
            "subscribed": len(rest.heard),
        }
        first.close()
        rest.close()
        return figures
