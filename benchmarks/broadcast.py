"""One channel and many subscribers: what each of them receives, and when."""

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
LONG = 10.0  # seconds; a fan-out that takes as long is done once
SAMPLE = 10  # one subscriber of so many tells when its events came

EVENT = b'data: {"number": '
TIMED_EVENT = re.compile(EVENT + rb'(\d+), "sent": (\d+),')
LONGEST = 80  # bytes that are part of one


class Subscribers(Clients):
    """Clients of ``/news``."""

    def __init__(self, server: Server) -> None:
        super().__init__(server, "/news", EVENT)
        self.timed: set[int] = set()
        self.delays: list[float] = []  # milliseconds, of those that are timed
        self.published: dict[int, int] = {}  # nanoseconds, by the event's number

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
        """Wait until all have subscribed."""
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
        self.unread[fd] = data[found[-1].end() if found else 0 :][-LONGEST:]
        return len(found)


def delivered(subscribers: Subscribers, count: int, rate: float, patience: float) -> dict[str, float]:
    """What it costs that everyone has so many events."""
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


def late(subscribers: Subscribers, rate: float) -> float:
    """Milliseconds that an event was published behind its schedule, at the most."""
    first = min(subscribers.published.items(), default=(0, 0))
    due = ((sent - first[1]) / 1e6 - (number - first[0]) * 1e3 / rate for number, sent in subscribers.published.items())
    return max(due, default=0.0)


def delays(subscribers: Subscribers) -> dict[str, float | None]:
    """How long events took, in milliseconds."""
    ordered = sorted(subscribers.delays)
    return {
        "p50 ms": ordered[len(ordered) // 2] if ordered else None,
        "p99 ms": ordered[len(ordered) * 99 // 100] if ordered else None,
        "max ms": ordered[-1] if ordered else None,
    }


def quantiles(values: list[float], steps: int = 200) -> list[float]:
    """So many and one, from the least to the most: what is needed to draw how they are distributed."""
    ordered = sorted(values)
    return [ordered[step * (len(ordered) - 1) // steps] for step in range(steps + 1)] if ordered else []


def chosen(figures: dict[str, float | None], names: Iterable[str]) -> dict[str, float | None]:
    return {name: figures[name] for name in names}


def fan(peer: str, size: Size) -> Sample:
    with serving(peer) as server:
        subscribers = Subscribers(server)
        subscribers.subscribe(size.subscribers)
        rounds: list[dict[str, float]] = []
        while len(rounds) < FAN_ROUNDS and (not rounds or rounds[-1]["seconds"] < LONG):
            rounds.append(delivered(subscribers, size.fan_events, 0, size.delivery))
        subscribers.close()
        columns = "us/delivery", "seconds", "delivered %", "server CPU %", "client CPU %"
        figures = {column: statistics.median(one[column] for one in rounds) for column in columns}
        return Sample(figures | {"delivered %": min(one["delivered %"] for one in rounds)})


def timed(peer: str, size: Size, rate: float, seconds: int, *, stuck: bool = False) -> Sample:
    with serving(peer) as server:
        idler = never_reading(server) if stuck else None
        subscribers = Subscribers(server)
        subscribers.subscribe(size.subscribers)
        figures: dict[str, float | None] = {**delivered(subscribers, round(rate * seconds), rate, size.delivery)}
        figures |= delays(subscribers)
        figures["late ms"] = late(subscribers, rate)
        subscribers.close()
        if idler is not None:
            idler.close()
        return Sample(figures, {"delays ms": list(quantiles(subscribers.delays))})


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


def pace(peer: str, size: Size) -> Sample:
    sample = timed(peer, size, size.pace_rate, size.pace_seconds)
    columns = "us/delivery", "p50 ms", "p99 ms", "delivered %", "server CPU %", "client CPU %"
    return Sample(chosen(dict(sample.figures), columns), sample.series)


def storm(peer: str, size: Size) -> Sample:
    """A peer that is called ``asgi_sse + 1 stuck`` has one more client, which reads nothing."""
    name, _, stuck = peer.partition(" ")
    sample = timed(name, size, size.storm_rate, size.storm_seconds, stuck=bool(stuck))
    columns = "us/delivery", "p50 ms", "p99 ms", "max ms", "late ms", "delivered %", "seconds"
    return Sample(chosen(dict(sample.figures), (*columns, "server CPU %", "client CPU %")), sample.series)


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
