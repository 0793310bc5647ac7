"""Benchmarks with one channel and many subscribers: the cost and the delays of deliveries."""

import re
import socket
import statistics
import time
from collections.abc import Iterable

from .clients import Clients, never
from .results import Sample
from .server import Server, cpu_of_this_process, serving
from .sizes import Size

FAN_ROUNDS = 3
LONG_ROUND_S = 10.0  # a fan-out that takes longer is not repeated
SAMPLE = 10  # one subscriber in ten records delays

EVENT = b'data: {"number": '
TIMED_EVENT = re.compile(EVENT + rb'(\d+), "sent": (\d+),')
LONGEST_MATCH_BYTES = 80


class Subscribers(Clients):
    """Clients of ``/news``. One in `SAMPLE` records the delay of each event."""

    def __init__(self, server: Server) -> None:
        super().__init__(server, "/news", EVENT)
        self.timed: set[int] = set()
        self.delays: list[float] = []  # milliseconds, of the timed subscribers
        self.published: dict[int, int] = {}  # event number -> time of publishing in nanoseconds

    def subscribe(self, number: int) -> None:
        self.add(number)
        self.settle()

    def add(self, number: int = 1) -> int:
        fd = -1
        for _ in range(number):
            fd = super().add()
            if len(self.sockets) % SAMPLE == 1:
                self.timed.add(fd)
        return fd

    def settle(self) -> None:
        """Wait until every client is subscribed."""
        self.run(lambda: len(self.heard) == len(self.sockets), 60)
        # Some peers start the response before they subscribe. A client that has received an event is subscribed.
        for _ in range(20):
            self.publish(1)
            self.run(lambda: all(self.counts.values()), 1)
            if all(self.counts.values()):
                break
        self.run(never, 0.3)
        self.restart()

    def restart(self) -> None:
        super().restart()
        self.delays = []
        self.published = {}

    def publish(self, count: int, rate: float = 0, pad: int = 0) -> None:
        self.server.connect(f"/publish?count={count}&rate={rate}&pad={pad}").close()

    def count(self, fd: int, data: bytes) -> int:
        if fd not in self.timed:
            return super().count(fd, data)
        now = time.monotonic_ns()
        found = list(TIMED_EVENT.finditer(data))
        for one in found:
            sent = int(one[2])
            self.published[int(one[1])] = sent
            self.delays.append((now - sent) / 1e6)
        self.unread[fd] = data[found[-1].end() if found else 0 :][-LONGEST_MATCH_BYTES:]
        return len(found)


def delivered(subscribers: Subscribers, count: int, rate: float, patience: float) -> dict[str, float]:
    """Publish events, wait until all are delivered, and return the cost.

    Args:
        subscribers: The clients.
        count: Number of events.
        rate: Events a second; 0 publishes all at once.
        patience: Seconds to wait after the last event.
    """
    expected = count * len(subscribers.sockets)
    subscribers.restart()
    server_cpu, client_cpu = subscribers.server.cpu(), cpu_of_this_process()
    subscribers.publish(count, rate)
    seconds = subscribers.run(lambda: subscribers.received >= expected, (count / rate if rate else 0) + patience)
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


def publisher_delay(subscribers: Subscribers, rate: float) -> float:
    """Return the longest delay of the publisher behind its schedule, in milliseconds."""
    first = min(subscribers.published.items(), default=(0, 0))
    due = ((sent - first[1]) / 1e6 - (number - first[0]) * 1e3 / rate for number, sent in subscribers.published.items())
    return max(due, default=0.0)


def delays(subscribers: Subscribers) -> dict[str, float | None]:
    """Return percentiles of the delivery delays, in milliseconds."""
    ordered = sorted(subscribers.delays)
    return {
        "p50 ms": ordered[len(ordered) // 2] if ordered else None,
        "p99 ms": ordered[len(ordered) * 99 // 100] if ordered else None,
        "max ms": ordered[-1] if ordered else None,
    }


def quantiles(values: list[float], steps: int = 200) -> list[float]:
    """Return `steps` + 1 quantiles from the lowest to the highest value, to plot a distribution."""
    ordered = sorted(values)
    return [ordered[step * (len(ordered) - 1) // steps] for step in range(steps + 1)] if ordered else []


def selected(figures: dict[str, float | None], names: Iterable[str]) -> dict[str, float | None]:
    return {name: figures[name] for name in names}


def fan(peer: str, size: Size) -> Sample:
    with serving(peer) as server:
        subscribers = Subscribers(server)
        subscribers.subscribe(size.subscribers)
        rounds: list[dict[str, float]] = []
        while len(rounds) < FAN_ROUNDS and (not rounds or rounds[-1]["seconds"] < LONG_ROUND_S):
            rounds.append(delivered(subscribers, size.fan_events, 0, size.delivery))
        subscribers.close()
        columns = "us/delivery", "seconds", "delivered %", "server CPU %", "client CPU %"
        figures = {column: statistics.median(one[column] for one in rounds) for column in columns}
        return Sample(figures | {"delivered %": min(one["delivered %"] for one in rounds)})


def timed(peer: str, size: Size, rate: float, seconds: int, *, stuck: bool = False) -> Sample:
    with serving(peer) as server:
        stuck_socket = stuck_subscriber(server) if stuck else None
        subscribers = Subscribers(server)
        subscribers.subscribe(size.subscribers)
        figures: dict[str, float | None] = {**delivered(subscribers, round(rate * seconds), rate, size.delivery)}
        figures |= delays(subscribers)
        figures["late ms"] = publisher_delay(subscribers, rate)
        subscribers.close()
        if stuck_socket is not None:
            stuck_socket.close()
        return Sample(figures, {"delays ms": list(quantiles(subscribers.delays))})


def stuck_subscriber(server: Server) -> socket.socket:
    """Connect a subscriber that reads nothing.

    The server has already sent it more than the socket buffers hold, so its next send blocks.
    """
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


def pace(peer: str, size: Size) -> Sample:
    sample = timed(peer, size, size.pace_rate, size.pace_seconds)
    columns = "us/delivery", "p50 ms", "p99 ms", "delivered %", "server CPU %", "client CPU %"
    return Sample(selected(dict(sample.figures), columns), sample.series)


def storm(peer: str, size: Size) -> Sample:
    """Measure a peer; the name ``asgi_sse + 1 stuck`` adds a client that reads nothing."""
    name, _, stuck = peer.partition(" ")
    sample = timed(name, size, size.storm_rate, size.storm_seconds, stuck=bool(stuck))
    columns = "us/delivery", "p50 ms", "p99 ms", "max ms", "late ms", "delivered %", "seconds"
    return Sample(selected(dict(sample.figures), (*columns, "server CPU %", "client CPU %")), sample.series)


def idle_sub(peer: str, size: Size) -> Sample:
    with serving(peer) as server:
        first, rest = Subscribers(server), Subscribers(server)
        first.subscribe(20)  # warm-up
        before = server.memory()
        rest.subscribe(size.idle_subscribers)
        figures = {
            "KiB/subscriber": (server.memory() - before) / size.idle_subscribers / 1024,
            "subscribed": len(rest.heard),
        }
        first.close()
        rest.close()
        return Sample(figures)
