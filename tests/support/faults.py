"""What tests of faults share: nodes, a proxy that cuts, clients that resume, and the check of what they were told.

The check knows of each event what its publisher knows: that it was acknowledged, and with which id, or that it may have
been published. Each client has to have got what was acknowledged, once and in order, or to have been told by a `reset`
at that place.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, TypeAlias

import psutil
from connection import Connection, figures, get
from faults_app import CHANNELS
from serving import HERE, command, free_port, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence
    from pathlib import Path

    from engines import Engine

SERVER: Final = "uvicorn-httptools-uvloop"
PATIENCE: Final = 60.0  # seconds after which what is waited for will not come any more
MIXES: Final = {
    ("a",): {"a"},
    ("b.x",): {"b.x"},
    ("a", "b.y"): {"a", "b.y"},
    ("b.*",): {"b.x", "b.y"},
    ("c.**",): {"c.1", "c.2", "c.1.d"},
    ("c.*", "e"): {"c.1", "c.2", "e"},
    ("e", "f", "g"): {"e", "f", "g"},
    ("h",): {"h"},
}

Direction: TypeAlias = Literal["to the engine", "to the node"]


# Nodes


class Node:
    """A server with the app, which may be killed and started again on its port."""

    def __init__(self, number: int, url: str, directory: Path) -> None:
        self.port = free_port()
        self.ledgers: list[Path] = []
        self._name = f"n{number}"
        self._url = url
        self._directory = directory
        self._stack = ExitStack()
        self._process: Any = None

    @property
    def runs(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        name = f"{self._name}x{len(self.ledgers)}"  # one that begins again counts from one
        self.ledgers.append(self._directory / f"{name}.ledger")
        variables = {
            "ASGI_SSE_FAULTS_URL": self._url,
            "ASGI_SSE_FAULTS_NODE": name,
            "ASGI_SSE_FAULTS_LEDGER": str(self.ledgers[-1]),
        }
        arguments = [*command(SERVER, "faults_app:app", self.port), f"--app-dir={HERE}"]
        self._process = self._stack.enter_context(
            serving(arguments, self.port, self._directory / f"{name}.log", variables=variables)
        )

    def stop(self) -> None:
        self._process = None
        self._stack.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.stop()

    @property
    def rss(self) -> float:
        """In MB."""
        memory: int = psutil.Process(self._process.pid).memory_info().rss
        return memory / 2**20

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self._directory.glob(f"{self._name}x*.log")))


# Connections that are cut


class _Pair:
    """A connection of a node, and the one to the engine that stands for it."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near, self.far = near, far
        self.cut_in: Direction | None = None  # as soon as something goes in that direction

    async def forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, direction: Direction) -> None:
        with suppress(OSError):
            while chunk := await source.read(65_536):
                if self.cut_in == direction:
                    target.write(chunk[: random.randrange(len(chunk))])
                    await asyncio.sleep(0.01)  # a reset takes what was not read before it
                    break
                target.write(chunk)
                await target.drain()
        self.close()

    def close(self) -> None:
        for writer in (self.near, self.far):
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0 and self.cut_in is not None and random.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # by a reset
            writer.transport.abort()


class Proxy:
    """Between a node and the engine, in a thread of its own. A context manager."""

    def __init__(self, engine: Engine) -> None:
        self.port = free_port()
        self.url = f"{engine.scheme}://127.0.0.1:{self.port}"
        self._target = engine.port
        self._is_open = True
        self._pairs: set[_Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._ready = threading.Event()
        self._end = asyncio.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)
        self._ready.set()
        await self._end.wait()
        server.close()
        self._close_all()

    async def _accepted(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        try:
            if not self._is_open:
                raise ConnectionRefusedError
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            near.transport.abort()
            return
        pair = _Pair(near, far)
        self._pairs.add(pair)
        await asyncio.gather(
            pair.forward(reader, far, "to the engine"), pair.forward(far_reader, near, "to the node")
        )  # fmt: skip
        self._pairs.discard(pair)

    def _close_all(self) -> None:
        for pair in self._pairs:
            pair.close()

    async def cut(self, direction: Direction) -> None:
        """Cut all connections, each of them inside of what goes next in that direction, if anything does soon."""
        await self._there(self._cut(direction))

    async def _cut(self, direction: Direction) -> None:
        pairs = list(self._pairs)
        for pair in pairs:
            pair.cut_in = direction
        for _ in range(20):
            if not self._pairs.intersection(pairs):
                return
            await asyncio.sleep(0.01)
        for pair in pairs:
            pair.close()

    async def shut(self) -> None:
        """Cut all, and let nobody in."""
        self._is_open = False
        await self._there(self._cut("to the engine"))

    async def open(self) -> None:
        """Let everybody in again."""
        self._is_open = True

    async def _there(self, step: Coroutine[Any, Any, None]) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(step, self._loop))


# Clients


class Told(NamedTuple):
    """What a client was told: an event, or (of nobody) a reset."""

    epoch: str
    number: int
    who: str
    nth: int  # of that publisher
    at: float  # when it was published
    is_last: bool = False


@cache  # all clients are told the same
def told(event_id: str, kind: str, data: str) -> Told:
    epoch, _, number = event_id.partition("-")
    if kind == "reset":
        return Told(epoch, int(number), "", 0, 0.0)
    said = json.loads(data)
    return Told(epoch, int(number), said["who"], said["count"], said["at"], said.get("last", False))


class Client:
    """Connects again and again, each time with the last id that it has, to either node.

    Args:
        nodes: The nodes.
        number: Its number, which settles what it reads.
        stay: Seconds after which it leaves by itself, on the average; ``None``: it does not.
    """

    def __init__(self, nodes: Sequence[Node], number: int, stay: float | None) -> None:
        self.mix, self.channels = list(MIXES.items())[number % len(MIXES)]
        self.first_id = ""
        self.last_id = ""
        self.told: list[Told] = []
        self.lasts = 0
        self.resets = 0
        self.awaits = 0.0  # an event that is younger
        self.came_at: float | None = None  # it came then
        self.connections = 0
        self._number = number
        self._nodes = nodes
        self._path = "/events?" + "&".join(f"channel={name}" for name in self.mix)
        self._chance = random.Random(number)
        self._stay = stay

    def await_one(self, after: float) -> None:
        """Note the time at which an event comes that was published `after`."""
        self.awaits, self.came_at = after, None

    @property
    def has_all(self) -> bool:
        return self.lasts >= len(self.channels)

    async def come_and_go(self) -> None:
        node = self._nodes[self._number // len(MIXES) % len(self._nodes)]
        while True:
            with Connection() as connection, suppress(OSError, TimeoutError):
                seconds = None if self._stay is None else self._chance.expovariate(1 / self._stay)
                async with asyncio.timeout(seconds):
                    await connection.request(node.port, self._path, self.last_id)
                    self.connections += 1
                    await self._read(connection)
            await asyncio.sleep(self._chance.uniform(0, 0.3))
            if self._chance.random() < 0.5 or not node.runs:
                node = self._chance.choice([node for node in self._nodes if node.runs])

    async def _read(self, connection: Connection) -> None:
        while not connection.complete:
            for event in await connection.read():
                row = told(str(event.id), str(event.event), str(event.data))
                self.told.append(row)
                self.lasts += row.is_last
                self.resets += not row.who
                if self.came_at is None and row.at > self.awaits:
                    self.came_at = time.monotonic()
            self.first_id = self.first_id or connection.first_id
            self.last_id = connection.decoder.last_event_id or self.last_id

    def __repr__(self) -> str:
        return f"<Client {self._number} of {' '.join(self.mix)} at {self.last_id}, last told {self.told[-1:]}>"


# The cluster


class Cluster:
    """Two nodes on an engine, and their clients. An async context manager.

    Args:
        engine: It runs.
        directory: For logs and ledgers.
        clients: How many.
        stay: See `Client`; given the number of each.
        proxied: Whether there is a proxy for each node.
    """

    def __init__(
        self, engine: Engine, directory: Path, clients: int, stay: Callable[[int], float | None], *, proxied: bool
    ) -> None:
        self.engine = engine
        self.proxies = [Proxy(engine) for _ in range(2 if proxied else 0)]
        urls = [proxy.url for proxy in self.proxies] or [engine.url] * 2
        self.nodes = [Node(number, url, directory) for number, url in enumerate(urls)]
        self.clients = [Client(self.nodes, number, stay(number)) for number in range(clients)]
        self._stack = ExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for proxy in self.proxies:
            self._stack.enter_context(proxy)
        for node in self.nodes:
            self._stack.callback(node.stop)
        await asyncio.gather(*(asyncio.to_thread(node.start) for node in self.nodes))
        self._tasks = [asyncio.create_task(client.come_and_go()) for client in self.clients]
        await self.until("connect", lambda client: bool(client.first_id))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._stack.close)

    async def until(self, what: str, condition: Callable[[Client], Any], seconds: float = PATIENCE) -> None:
        """Wait until it is so of every client, or fail."""
        deadline = time.monotonic() + seconds
        waiting = self.clients
        while waiting := [client for client in waiting if not condition(client)]:
            for task in self._tasks:
                assert not task.done(), task.result()
            if time.monotonic() > deadline:
                figures = [await self.figures(node) for node in self.nodes if node.runs]
                raise AssertionError(
                    f"{len(waiting)} clients hang, did not {what}: {waiting[:5]}; nodes: {figures}; {self.logs()}"
                )
            await asyncio.sleep(0.01)

    async def recovery(self) -> float:
        """Seconds from now until every client has an event that was published after now."""
        now = time.monotonic()
        for client in self.clients:
            client.await_one(now)
        await self.until("recover", lambda client: client.came_at is not None)
        return max(client.came_at or 0.0 for client in self.clients) - now

    async def begin(self, rate: float, *, again: bool) -> None:
        """Publish so many a second, on both nodes together."""
        for node in self.nodes:
            await self.begin_on(node, rate / 2, again=again)

    async def begin_on(self, node: Node, rate: float, *, again: bool) -> None:
        await get(node.port, f"/begin?rate={rate}&again={again:d}")

    async def finish(self) -> None:
        """Publish no more, but one last event for each channel, which every client gets."""
        there = [node for node in self.nodes if node.runs]
        async with asyncio.timeout(2 * PATIENCE):
            for node in there:
                await get(node.port, "/finish")
            await get(random.choice(there).port, "/last")
        await self.until("get the last events", lambda client: client.has_all)

    async def figures(self, node: Node) -> Any:
        async with asyncio.timeout(PATIENCE / 2):
            return await figures(node.port)

    def rss(self) -> list[float]:
        return [node.rss for node in self.nodes if node.runs]

    def resets(self) -> int:
        """How many clients were told."""
        return sum(client.resets for client in self.clients)

    def logs(self) -> str:
        return "".join(node.log()[-3_000:] for node in self.nodes)

    def verdict(self) -> Verdict:
        return check(self.clients, Ledger([path for node in self.nodes for path in node.ledgers]))


# The check


class Acknowledged(NamedTuple):
    number: int
    who: str
    nth: int  # of that publisher
    channel: str


class Ledger:
    """What the publishers have written down."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.channel: dict[tuple[str, int], str] = {}
        self.ids: dict[tuple[str, int], tuple[str, int]] = {}
        self.failures = 0
        self.at_first: dict[str, list[int]] = defaultdict(list)  # by publisher, in its order: those that went at once
        self.epochs: dict[str, float] = {}  # each with the time at which something was acknowledged in it first
        for path in paths:
            for line in path.read_text().splitlines():
                kind, who, count, *rest = line.split(" ")
                self._add(kind, (who, int(count)), rest)
        self.of_epoch: dict[str, list[Acknowledged]] = defaultdict(list)
        for name, (epoch, number) in self.ids.items():
            self.of_epoch[epoch].append(Acknowledged(number, *name, self.channel[name]))
        for rows in self.of_epoch.values():
            rows.sort()

    def _add(self, kind: str, name: tuple[str, int], rest: list[str]) -> None:
        if kind == "t":
            self.channel[name] = rest[0]
        elif kind == "f":
            self.failures += 1
        else:
            epoch, _, number = rest[0].partition("-")
            self.ids[name] = epoch, int(number)
            self.epochs[epoch] = min(self.epochs.get(epoch, float(rest[1])), float(rest[1]))
            if rest[2] == "1":
                self.at_first[name[0]].append(name[1])


@dataclass
class Verdict:
    """What came of it.

    Attributes:
        published: Events that were to be published.
        acknowledged: Those that were.
        failures: Times that publishing raised.
        delivered: Events that clients were told of.
        resets: Those that they were told of.
        missed: Acknowledged events that they missed, and were told so by a reset.
        lost: Those that they missed, and nobody told them.
        doubled: Those that they were told of more than once, or out of order.
        wrong: What else must not be: of each the number.
        again: Those that they were told of in two epochs, since the engine had lost it before it was acknowledged.
        examples: Some of what is wrong.
    """

    published: int
    acknowledged: int
    failures: int
    delivered: int = 0
    resets: int = 0
    missed: int = 0
    lost: int = 0
    doubled: int = 0
    again: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, what: str, example: object) -> None:
        """Count something that must not be."""
        self.wrong[what] += 1
        if self.wrong[what] <= 3:
            self.examples.append(f"{what}: {example}")

    def __str__(self) -> str:
        return (
            f"{self.published} events, {self.acknowledged} acknowledged, {self.failures} times failed; "
            f"{self.delivered} delivered, {self.resets} resets for {self.missed} missed, {self.again} again; "
            f"lost silently {self.lost}, doubled {self.doubled}, else wrong {dict(self.wrong)}"
        )

    def assert_good(self) -> None:
        assert self.acknowledged
        assert self.delivered
        assert not self.examples, (str(self), self.examples)
        assert self.lost == self.doubled == 0


def check(clients: Iterable[Client], ledger: Ledger) -> Verdict:
    """See what every client was told against what was acknowledged."""
    verdict = Verdict(len(ledger.channel), len(ledger.ids), ledger.failures)
    _check_ids(ledger, verdict)
    names: dict[tuple[str, int], tuple[str, int]] = {}  # of each id, the event
    for client in clients:
        _check_client(client, ledger, verdict)
        for row in client.told:
            if row.who and names.setdefault((row.epoch, row.number), (row.who, row.nth)) != (row.who, row.nth):
                verdict.add("an id of two events", row)
    return verdict


def _check_ids(ledger: Ledger, verdict: Verdict) -> None:
    for rows in ledger.of_epoch.values():
        for before, after in pairwise(rows):
            if before.number == after.number:
                verdict.add("acknowledged with the id of another one", (before, after))
    # What a publisher began to publish first comes first; it may be acknowledged in the same moment.
    for who, counts in ledger.at_first.items():
        last: tuple[str, int] = "", 0
        for count in sorted(counts):
            this = ledger.ids[who, count]
            if this[0] == last[0] and this[1] < last[1]:
                verdict.add("not in the order of its publisher", (who, count, last, this))
            last = this


def _check_client(client: Client, ledger: Ledger, verdict: Verdict) -> None:
    epoch, _, number = client.first_id.partition("-")
    start = end = int(number)
    part: set[tuple[str, int]] = set()  # since the last reset
    known: dict[tuple[str, int], str] = {}  # the epoch in which it was seen last
    for row in client.told:
        name = row.who, row.nth
        if not row.who:
            verdict.resets += 1
            if row.epoch == epoch and row.number < end:
                verdict.add("a reset to before what was told already", (client, row, end))
            _check_part(client, ledger, verdict, part, (epoch, start, end))
            verdict.missed += _count(client, ledger, epoch, end, row.number if row.epoch == epoch else None)
            epoch, start, end, part = row.epoch, row.number, row.number, set()
            continue
        verdict.delivered += 1
        if row.epoch != epoch:
            verdict.add("another epoch without a reset", (client, row, epoch))
            epoch, start, end, part = row.epoch, row.number - 1, row.number - 1, set()
        if row.number <= end or known.get(name) == epoch:
            verdict.doubled += 1
            verdict.add("doubled", (client, row, end))
        verdict.again += name in known and known[name] != epoch
        end = max(end, row.number)
        known[name] = epoch
        part.add(name)
        _check_event(client, ledger, verdict, row)
    _check_part(client, ledger, verdict, part, (epoch, start, None))


def _check_event(client: Client, ledger: Ledger, verdict: Verdict, row: Told) -> None:
    """An event that is none of its channels, or not what was acknowledged by that id."""
    name = row.who, row.nth
    if ledger.channel.get(name) not in client.channels:
        verdict.add("not of its channels", (client, row))
    acknowledged = ledger.ids.get(name)
    if acknowledged is None or acknowledged == (row.epoch, row.number):
        return
    # It may have been in a log that was lost, before it was acknowledged in the next one.
    first = ledger.epochs.get(row.epoch, 0.0)
    if acknowledged[0] == row.epoch or first > ledger.epochs[acknowledged[0]]:
        verdict.add("not the id that was acknowledged", (client, row, acknowledged))


def _check_part(
    client: Client,
    ledger: Ledger,
    verdict: Verdict,
    part: set[tuple[str, int]],
    place: tuple[str, int, int | None],
) -> None:
    """All that was acknowledged between two places has to be in it; without an end, all that follows."""
    epoch, start, end = place
    for row in ledger.of_epoch.get(epoch, ()):
        if row.number <= start or (end is not None and row.number > end):
            continue
        if row.channel in client.channels and (row.who, row.nth) not in part:
            verdict.lost += 1
            verdict.add("lost silently", (client, row, place))


def _count(client: Client, ledger: Ledger, epoch: str, after: int, until: int | None) -> int:
    return sum(
        row.channel in client.channels and row.number > after and (until is None or row.number <= until)
        for row in ledger.of_epoch.get(epoch, ())
    )


assert set().union(*MIXES.values()) == set(CHANNELS)
