"""App processes, a proxy that cuts connections, clients that resume, and the check of what the clients received.

Publishers write a ledger: each event was acknowledged with an id, or may have been published. Each client must have
received all acknowledged events of its channels, once and in order. Where events are missing, it must have received a
`reset` at that point.
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

    from backend_servers import BackendServer

SERVER: Final = "uvicorn-httptools-uvloop"
TIMEOUT_S: Final = 60.0  # seconds that a test waits for anything
SUBSCRIPTIONS: Final = {
    ("a",): {"a"},
    ("b.x",): {"b.x"},
    ("a", "b.y"): {"a", "b.y"},
    ("b.*",): {"b.x", "b.y"},
    ("c.**",): {"c.1", "c.2", "c.1.d"},
    ("c.*", "e"): {"c.1", "c.2", "e"},
    ("e", "f", "g"): {"e", "f", "g"},
    ("h",): {"h"},
}

Direction: TypeAlias = Literal["to the server", "to the app"]


# App processes


class AppProcess:
    """An HTTP server with the app, which can be killed and started again on its port."""

    def __init__(self, number: int, url: str, directory: Path) -> None:
        self.port = free_port()
        self.ledgers: list[Path] = []
        self._name = f"p{number}"
        self._url = url
        self._directory = directory
        self._stack = ExitStack()
        self._process: Any = None

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        name = f"{self._name}x{len(self.ledgers)}"  # a restarted process counts its events from 1 again
        self.ledgers.append(self._directory / f"{name}.ledger")
        variables = {
            "ASGI_SSE_FAULTS_URL": self._url,
            "ASGI_SSE_FAULTS_PUBLISHER": name,
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
        """Resident memory, in MB."""
        memory: int = psutil.Process(self._process.pid).memory_info().rss
        return memory / 2**20

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self._directory.glob(f"{self._name}x*.log")))


# Connections that can be cut


class _Pair:
    """A connection from an app process, and the one to the server that continues it."""

    def __init__(self, app: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.app, self.server = app, server
        self.cut_in: Direction | None = None  # cut inside the next data in that direction

    async def forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, direction: Direction) -> None:
        with suppress(OSError):
            while chunk := await source.read(65_536):
                if self.cut_in == direction:
                    target.write(chunk[: random.randrange(len(chunk))])
                    await asyncio.sleep(0.01)  # a TCP reset would discard data that was not read yet
                    break
                target.write(chunk)
                await target.drain()
        self.close()

    def close(self) -> None:
        for writer in (self.app, self.server):
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0 and self.cut_in is not None and random.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # TCP reset
            writer.transport.abort()


class Proxy:
    """A TCP proxy between an app process and the server, in a thread of its own. A context manager."""

    def __init__(self, server: BackendServer) -> None:
        self.port = free_port()
        self.url = f"{server.scheme}://127.0.0.1:{self.port}"
        self._target = server.port
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
        listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self._ready.set()
        await self._end.wait()
        listener.close()
        self._close_all()

    async def _accept(self, reader: asyncio.StreamReader, app: asyncio.StreamWriter) -> None:
        try:
            if not self._is_open:
                raise ConnectionRefusedError
            server_reader, server = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            app.transport.abort()
            return
        pair = _Pair(app, server)
        self._pairs.add(pair)
        await asyncio.gather(
            pair.forward(reader, server, "to the server"), pair.forward(server_reader, app, "to the app")
        )  # fmt: skip
        self._pairs.discard(pair)

    def _close_all(self) -> None:
        for pair in self._pairs:
            pair.close()

    async def cut(self, direction: Direction) -> None:
        """Cut each connection inside the next data in that direction, or after 0.2 seconds without data."""
        await self._in_own_loop(self._cut(direction))

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
        """Cut all connections and refuse new ones."""
        self._is_open = False
        await self._in_own_loop(self._cut("to the server"))

    async def open(self) -> None:
        """Accept connections again."""
        self._is_open = True

    async def _in_own_loop(self, step: Coroutine[Any, Any, None]) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(step, self._loop))


# Clients


class Received(NamedTuple):
    """An event that a client received. A reset has no publisher."""

    epoch: str
    offset: int
    publisher: str
    sequence: int  # number of the event among those of its publisher
    published_at: float
    is_last: bool = False


@cache  # many clients receive the same event
def parse(event_id: str, kind: str, data: str) -> Received:
    epoch, _, offset = event_id.partition("-")
    if kind == "reset":
        return Received(epoch, int(offset), "", 0, 0.0)
    fields = json.loads(data)
    return Received(
        epoch, int(offset), fields["publisher"], fields["count"], fields["published_at"], fields.get("last", False)
    )


class Client:
    """Reads a stream, and reconnects to any process with its last event id.

    Args:
        processes: The app processes.
        number: The number of the client, which determines its channels.
        stay: Seconds after which it disconnects by itself, on average; ``None``: it does not.
    """

    def __init__(self, processes: Sequence[AppProcess], number: int, stay: float | None) -> None:
        self.names, self.channels = list(SUBSCRIPTIONS.items())[number % len(SUBSCRIPTIONS)]
        self.first_id = ""
        self.last_id = ""
        self.received: list[Received] = []
        self.lasts = 0
        self.resets = 0
        self.awaits_after = 0.0  # waits for an event that was published after this time
        self.arrived_at: float | None = None  # when that event arrived
        self.connections = 0
        self._number = number
        self._processes = processes
        self._path = "/events?" + "&".join(f"channel={name}" for name in self.names)
        self._chance = random.Random(number)
        self._stay = stay

    def await_event(self, after: float) -> None:
        """Record in `arrived_at` when an event arrives that was published after this time."""
        self.awaits_after, self.arrived_at = after, None

    @property
    def has_all(self) -> bool:
        return self.lasts >= len(self.channels)

    async def keep_reading(self) -> None:
        process = self._processes[self._number // len(SUBSCRIPTIONS) % len(self._processes)]
        while True:
            with Connection() as connection, suppress(OSError, TimeoutError):
                seconds = None if self._stay is None else self._chance.expovariate(1 / self._stay)
                async with asyncio.timeout(seconds):
                    await connection.request(process.port, self._path, self.last_id)
                    self.connections += 1
                    await self._read(connection)
            await asyncio.sleep(self._chance.uniform(0, 0.3))
            if self._chance.random() < 0.5 or not process.is_running:
                process = self._chance.choice([process for process in self._processes if process.is_running])

    async def _read(self, connection: Connection) -> None:
        while not connection.complete:
            for event in await connection.read():
                row = parse(str(event.id), str(event.event), str(event.data))
                self.received.append(row)
                self.lasts += row.is_last
                self.resets += not row.publisher
                if self.arrived_at is None and row.published_at > self.awaits_after:
                    self.arrived_at = time.monotonic()
            self.first_id = self.first_id or connection.first_id
            self.last_id = connection.decoder.last_event_id or self.last_id

    def __repr__(self) -> str:
        return (
            f"<Client {self._number} of {' '.join(self.names)} at {self.last_id}, received last {self.received[-1:]}>"
        )


# The cluster


class Cluster:
    """Two app processes on one server, and their clients. An async context manager.

    Args:
        server: A running server.
        directory: For logs and ledgers.
        clients: Number of clients.
        stay: Returns the argument `stay` of each client, by its number.
        proxied: Whether each process reaches the server through a proxy.
    """

    def __init__(
        self,
        server: BackendServer,
        directory: Path,
        clients: int,
        stay: Callable[[int], float | None],
        *,
        proxied: bool,
    ) -> None:
        self.server = server
        self.proxies = [Proxy(server) for _ in range(2 if proxied else 0)]
        urls = [proxy.url for proxy in self.proxies] or [server.url] * 2
        self.processes = [AppProcess(number, url, directory) for number, url in enumerate(urls)]
        self.clients = [Client(self.processes, number, stay(number)) for number in range(clients)]
        self._stack = ExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for proxy in self.proxies:
            self._stack.enter_context(proxy)
        for process in self.processes:
            self._stack.callback(process.stop)
        await asyncio.gather(*(asyncio.to_thread(process.start) for process in self.processes))
        self._tasks = [asyncio.create_task(client.keep_reading()) for client in self.clients]
        await self.wait_until("connect", lambda client: bool(client.first_id))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._stack.close)

    async def wait_until(self, what: str, condition: Callable[[Client], Any], seconds: float = TIMEOUT_S) -> None:
        """Wait until the condition is true for every client; fail after `seconds`."""
        deadline = time.monotonic() + seconds
        waiting = self.clients
        while waiting := [client for client in waiting if not condition(client)]:
            for task in self._tasks:
                assert not task.done(), task.result()
            if time.monotonic() > deadline:
                statistics = [await self.statistics(each) for each in self.processes if each.is_running]
                raise AssertionError(
                    f"{len(waiting)} clients did not {what}: {waiting[:5]}; processes: {statistics}; {self.logs()}"
                )
            await asyncio.sleep(0.01)

    async def recovery(self) -> float:
        """Return the seconds until every client has received an event that was published after the call."""
        now = time.monotonic()
        for client in self.clients:
            client.await_event(now)
        await self.wait_until("recover", lambda client: client.arrived_at is not None)
        return max(client.arrived_at or 0.0 for client in self.clients) - now

    async def begin(self, rate: float, *, retry: bool) -> None:
        """Publish `rate` events a second, half of them in each process."""
        for process in self.processes:
            await self.begin_on(process, rate / 2, retry=retry)

    async def begin_on(self, process: AppProcess, rate: float, *, retry: bool) -> None:
        await get(process.port, f"/begin?rate={rate}&retry={retry:d}")

    async def finish(self) -> None:
        """Stop publishing, publish a last event in each channel, and wait until every client has them."""
        running = [process for process in self.processes if process.is_running]
        async with asyncio.timeout(2 * TIMEOUT_S):
            for process in running:
                await get(process.port, "/finish")
            await get(random.choice(running).port, "/last")
        await self.wait_until("get the last events", lambda client: client.has_all)

    async def statistics(self, process: AppProcess) -> Any:
        async with asyncio.timeout(TIMEOUT_S / 2):
            return await figures(process.port)

    def rss(self) -> list[float]:
        return [process.rss for process in self.processes if process.is_running]

    def resets(self) -> int:
        """Return how many resets the clients received in total."""
        return sum(client.resets for client in self.clients)

    def logs(self) -> str:
        return "".join(process.log()[-3_000:] for process in self.processes)

    def verdict(self) -> Verdict:
        return check(self.clients, Ledger([path for process in self.processes for path in process.ledgers]))


# The check


class Acknowledged(NamedTuple):
    offset: int
    publisher: str
    sequence: int
    channel: str


class Ledger:
    """The events that the publishers wrote down."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.channel: dict[tuple[str, int], str] = {}
        self.ids: dict[tuple[str, int], tuple[str, int]] = {}
        self.failures = 0
        self.first_attempts: dict[str, list[int]] = defaultdict(
            list
        )  # by publisher: the counts acknowledged at the first attempt
        self.epochs: dict[str, float] = {}  # with the time of the first acknowledgement
        for path in paths:
            for line in path.read_text().splitlines():
                kind, publisher, count, *rest = line.split(" ")
                self._add(kind, (publisher, int(count)), rest)
        self.of_epoch: dict[str, list[Acknowledged]] = defaultdict(list)
        for name, (epoch, offset) in self.ids.items():
            self.of_epoch[epoch].append(Acknowledged(offset, *name, self.channel[name]))
        for rows in self.of_epoch.values():
            rows.sort()

    def _add(self, kind: str, name: tuple[str, int], rest: list[str]) -> None:
        if kind == "t":
            self.channel[name] = rest[0]
        elif kind == "f":
            self.failures += 1
        else:
            epoch, _, offset = rest[0].partition("-")
            self.ids[name] = epoch, int(offset)
            self.epochs[epoch] = min(self.epochs.get(epoch, float(rest[1])), float(rest[1]))
            if rest[2] == "1":
                self.first_attempts[name[0]].append(name[1])


@dataclass
class Verdict:
    """The result of the check.

    Attributes:
        published: Number of events that publishers tried to publish.
        acknowledged: Number of acknowledged events.
        failures: Number of times that publishing raised.
        delivered: Number of events that clients received.
        resets: Number of resets that clients received.
        missed: Number of acknowledged events that clients missed with a reset.
        lost: Number of acknowledged events that clients missed without a reset.
        doubled: Number of events that clients received more than once, or out of order.
        repeated: Number of events that clients received in two epochs, since the server had lost them before they were
            acknowledged.
        wrong: Number of violations, by kind.
        examples: Up to three examples of each kind.
    """

    published: int
    acknowledged: int
    failures: int
    delivered: int = 0
    resets: int = 0
    missed: int = 0
    lost: int = 0
    doubled: int = 0
    repeated: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, what: str, example: object) -> None:
        """Count a violation."""
        self.wrong[what] += 1
        if self.wrong[what] <= 3:
            self.examples.append(f"{what}: {example}")

    def __str__(self) -> str:
        return (
            f"{self.published} events, {self.acknowledged} acknowledged, {self.failures} failures; "
            f"{self.delivered} delivered, {self.resets} resets for {self.missed} missed, {self.repeated} repeated; "
            f"lost silently {self.lost}, doubled {self.doubled}, violations {dict(self.wrong)}"
        )

    def assert_good(self) -> None:
        assert self.acknowledged
        assert self.delivered
        assert not self.examples, (str(self), self.examples)
        assert self.lost == self.doubled == 0


def check(clients: Iterable[Client], ledger: Ledger) -> Verdict:
    """Compare the events that the clients received with the acknowledged ones."""
    verdict = Verdict(len(ledger.channel), len(ledger.ids), ledger.failures)
    _check_ids(ledger, verdict)
    names: dict[tuple[str, int], tuple[str, int]] = {}  # id → event
    for client in clients:
        _check_client(client, ledger, verdict)
        for row in client.received:
            name = row.publisher, row.sequence
            if row.publisher and names.setdefault((row.epoch, row.offset), name) != name:
                verdict.add("one id for two events", row)
    return verdict


def _check_ids(ledger: Ledger, verdict: Verdict) -> None:
    for rows in ledger.of_epoch.values():
        for before, after in pairwise(rows):
            if before.offset == after.offset:
                verdict.add("two events acknowledged with one id", (before, after))
    # Events of one publisher are in the order in which it sent them, even if they were acknowledged together.
    for publisher, counts in ledger.first_attempts.items():
        last: tuple[str, int] = "", 0
        for count in sorted(counts):
            this = ledger.ids[publisher, count]
            if this[0] == last[0] and this[1] < last[1]:
                verdict.add("not in the order of the publisher", (publisher, count, last, this))
            last = this


def _check_client(client: Client, ledger: Ledger, verdict: Verdict) -> None:
    epoch, _, offset = client.first_id.partition("-")
    start = end = int(offset)
    part: set[tuple[str, int]] = set()  # events since the last reset
    known: dict[tuple[str, int], str] = {}  # event → the epoch in which it was received last
    for row in client.received:
        name = row.publisher, row.sequence
        if not row.publisher:
            verdict.resets += 1
            if row.epoch == epoch and row.offset < end:
                verdict.add("a reset to before a received event", (client, row, end))
            _check_part(client, ledger, verdict, part, (epoch, start, end))
            verdict.missed += _count(client, ledger, epoch, end, row.offset if row.epoch == epoch else None)
            epoch, start, end, part = row.epoch, row.offset, row.offset, set()
            continue
        verdict.delivered += 1
        if row.epoch != epoch:
            verdict.add("a new epoch without a reset", (client, row, epoch))
            epoch, start, end, part = row.epoch, row.offset - 1, row.offset - 1, set()
        if row.offset <= end or known.get(name) == epoch:
            verdict.doubled += 1
            verdict.add("doubled", (client, row, end))
        verdict.repeated += name in known and known[name] != epoch
        end = max(end, row.offset)
        known[name] = epoch
        part.add(name)
        _check_event(client, ledger, verdict, row)
    _check_part(client, ledger, verdict, part, (epoch, start, None))


def _check_event(client: Client, ledger: Ledger, verdict: Verdict, row: Received) -> None:
    """Check that an event is of the client's channels, and has the id that was acknowledged."""
    name = row.publisher, row.sequence
    if ledger.channel.get(name) not in client.channels:
        verdict.add("not of the channels of the client", (client, row))
    acknowledged = ledger.ids.get(name)
    if acknowledged is None or acknowledged == (row.epoch, row.offset):
        return
    # The event may have been in a log that was lost, before it was acknowledged in the next one.
    first = ledger.epochs.get(row.epoch, 0.0)
    if acknowledged[0] == row.epoch or first > ledger.epochs[acknowledged[0]]:
        verdict.add("another id than the acknowledged one", (client, row, acknowledged))


def _check_part(
    client: Client,
    ledger: Ledger,
    verdict: Verdict,
    part: set[tuple[str, int]],
    span: tuple[str, int, int | None],
) -> None:
    """Check that `part` has all acknowledged events of a span: epoch, start, and end or ``None``."""
    epoch, start, end = span
    for row in ledger.of_epoch.get(epoch, ()):
        if row.offset <= start or (end is not None and row.offset > end):
            continue
        if row.channel in client.channels and (row.publisher, row.sequence) not in part:
            verdict.lost += 1
            verdict.add("lost silently", (client, row, span))


def _count(client: Client, ledger: Ledger, epoch: str, after: int, until: int | None) -> int:
    return sum(
        row.channel in client.channels and row.offset > after and (until is None or row.offset <= until)
        for row in ledger.of_epoch.get(epoch, ())
    )


assert set().union(*SUBSCRIPTIONS.values()) == set(CHANNELS)
