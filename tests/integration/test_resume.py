"""Channels on real servers.

Clients that disconnect and resume get every event once. A client that does not read blocks no other client. Events that
synchronous views publish arrive.

The tests are short unless ``ASGI_SSE_STRESS`` is ``full``.
"""

import asyncio
import json
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from channel_app import EACH, PUBLISHERS
from connection import Connection, figures, get
from serving import process, running

FULL = os.environ.get("ASGI_SSE_STRESS") == "full"
CLIENTS = 1_000 if FULL else 100
SECONDS = 30 if FULL else 3
SERVERS = ["uvicorn-httptools-uvloop", "uvicorn-h11-asyncio", "hypercorn-asyncio"]
MIXES = [("a",), ("b.x",), ("a", "b.y"), ("b.*",), ("a", "b.*")]
CHANNELS = {"a": {"a"}, "b.x": {"b.x"}, "b.y": {"b.y"}, "b.*": {"b.x", "b.y"}}
PAUSE = 1.5 if FULL else 0.6  # the most seconds that a client is away: limits the connections per second
TIMEOUT = SECONDS + 120  # the most seconds that a test may take

T = TypeVar("T")
Row = tuple[int, str, int]  # the offset of an event, its publisher, and the publisher's count


@pytest.fixture(scope="module", autouse=True)
def many_files() -> Iterator[None]:
    """Allow more than 1,024 open files, a common limit: each client has one here and one in the server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8_192)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


async def until(port: int, condition: Callable[[Any], bool]) -> Any:
    """Return the figures of the app as soon as they meet `condition`."""
    while not condition(found := await figures(port)):
        await asyncio.sleep(0.05)
    return found


def rows(figures: Any) -> list[Row]:
    """Return the events that were published."""
    return [(offset, publisher, count) for offset, publisher, count in figures["published"]]


def offset_of_id(event_id: str) -> int:
    return int(event_id.partition("-")[2])


@cache  # all clients see the same events
def row_of(event_id: str, data: str) -> Row:
    fields = json.loads(data)
    return offset_of_id(event_id), fields["publisher"], fields["count"]


async def gather(steps: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all steps at once; the first error cancels the others."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(step) for step in steps]
    return [task.result() for task in tasks]


def run(test: Coroutine[Any, Any, None], log: Path) -> None:
    """Run a test, and check that its server logged no traceback."""
    asyncio.run(asyncio.wait_for(test, TIMEOUT))
    assert b"Traceback" not in log.read_bytes(), log.read_text()


# Clients that disconnect and resume


class Client:
    """A client that connects again and again, each time with the last id that it has."""

    def __init__(self, port: int, number: int, counts: Counter[str]) -> None:
        self.mix = MIXES[number % len(MIXES)]
        self.channels = set[str]().union(*(CHANNELS[name] for name in self.mix))
        self.first_id = ""
        self.last_id = ""
        self.seen: list[Row] = []
        self._ended: set[str] = set()  # the channels whose last event it has
        self._port = port
        self._path = "/events?" + "&".join(f"channel={name}" for name in self.mix)
        self._chance = random.Random(number)
        self._counts = counts

    async def reconnect_often(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 or not self.last_id:
            await asyncio.sleep(self._chance.uniform(0, PAUSE))
            with Connection() as connection:
                await self._connect(connection)
                seen = len(self.seen)
                await self._read_some(connection, min(self._chance.expovariate(1.2), max(left, 0.1)))
                self._counts["before the first event"] += len(self.seen) == seen
                self._counts["inside of an event"] += connection.inside
                if self._chance.random() < 0.5:
                    connection.reset()

    async def _read_some(self, connection: Connection, seconds: float) -> None:
        leaves = self._chance.choice(["at once", "unread", "opened", "at random", "at random", "inside", "inside"])
        if leaves == "unread":
            await asyncio.sleep(self._chance.uniform(0, 0.1))
        if leaves == "opened":
            while not connection.first_id:
                await self._read(connection, 16)
        if leaves in {"at random", "inside"}:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while True:
                        await self._read(connection)
        if leaves == "inside":
            while not connection.inside:
                await self._read(connection, self._chance.randint(1, 40))

    async def read_to_the_end(self) -> None:
        with Connection() as connection:
            await self._connect(connection)
            while self._ended != self.channels:
                await self._read(connection)

    async def _connect(self, connection: Connection) -> None:
        self._counts["connections"] += 1
        await connection.request(self._port, self._path, self.last_id)

    async def _read(self, connection: Connection, size: int = 65_536) -> None:
        for event in await connection.read(size):
            if event.event == "reset":
                self._counts["resets"] += 1
                continue
            self.seen.append(row_of(str(event.id), str(event.data)))
            if "the last one" in str(event.data):
                self._ended.add(self.seen[-1][1])
        self.first_id = self.first_id or connection.first_id
        self.last_id = connection.decoder.last_event_id or self.last_id


@pytest.mark.parametrize("server", SERVERS if FULL else SERVERS[:1])
def test_clients_that_resume_get_every_event_once(server: str, log: Path) -> None:
    with running(server, "channel_app:resuming", log) as port:
        run(disconnect_and_resume(server, port), log)


async def disconnect_and_resume(server: str, port: int) -> None:
    counts = Counter({"resets": 0})
    clients = [Client(port, number, counts) for number in range(CLIENTS)]
    await get(port, "/begin")
    await gather([client.reconnect_often(SECONDS) for client in clients])
    await get(port, "/finish")
    began = time.monotonic()
    await gather([client.read_to_the_end() for client in clients])
    seconds = time.monotonic() - began
    published = rows(await until(port, lambda now: now["streams"] == 1 and now["subscribers"] == 0))
    for client in clients:
        since = offset_of_id(client.first_id)
        wanted = [row for row in published if row[0] > since and row[1] in client.channels]
        counts["delivered"] += len(client.seen)
        counts["lost"] += len(set(wanted) - set(client.seen))
        counts["doubled"] += len(client.seen) - len(set(client.seen))
        counts["not as published"] += client.seen != wanted
    print(
        f"{server}: {len(published)} events, {CLIENTS} clients: {dict(counts)}; all clients had the last events within "
        f"{seconds:.1f} s"
    )
    assert counts["lost"] == counts["doubled"] == counts["not as published"] == counts["resets"] == 0
    assert len({client.last_id.partition("-")[0] for client in clients}) == 1
    assert counts["before the first event"] > CLIENTS / 4
    assert counts["inside of an event"] > CLIENTS / 4


# Clients, including some that do not read

HISTORY = 100  # the `history` of the app's broker
EVENTS = 1_000
BATCH = 20  # events that are published at a time; a client could lose some if it were more than the history


class Reader:
    """A client that reads in one connection."""

    def __init__(self, stack: ExitStack, *, slow: bool = False) -> None:
        self.connection = stack.enter_context(Connection(slow=slow))
        self.seen: list[Row] = []
        self.resets: list[tuple[int, int, str]] = []  # the events before the reset, its offset and its data

    async def begin(self, port: int, path: str) -> None:
        await self.connection.request(port, path)
        await self.read_until(lambda: bool(self.connection.first_id))

    async def read_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            for event in await self.connection.read():
                if event.event == "reset":
                    self.resets.append((len(self.seen), offset_of_id(str(event.id)), str(event.data)))
                else:
                    self.seen.append(row_of(str(event.id), str(event.data)))

    async def read_to(self, last: Row) -> None:
        await self.read_until(lambda: self.seen[-1:] == [last])


@pytest.mark.parametrize("server", SERVERS[:2] if FULL else SERVERS[:1])
def test_clients_that_do_not_read_block_no_others(server: str, log: Path) -> None:
    with process(server, "channel_app:crowded", log) as (port, running_process), ExitStack() as stack:
        run(read_beside_stuck_clients(server, port, psutil.Process(running_process.pid), stack), log)


async def read_beside_stuck_clients(server: str, port: int, server_process: psutil.Process, stack: ExitStack) -> None:
    readers = [Reader(stack) for _ in range(CLIENTS - 3)]
    patient, strict, impatient = stuck = [Reader(stack, slow=True) for _ in range(3)]
    await gather([reader.begin(port, "/patient?channel=a") for reader in readers])
    paths = ["/patient?channel=a&channel=big", "/strict", "/impatient?channel=big"]
    await gather([reader.begin(port, path) for reader, path in zip(stuck, paths, strict=True)])

    before = peak = 0
    longest, began = 0.0, time.monotonic()
    for number in range(BATCH, EVENTS + 1, BATCH):
        published_at = time.monotonic()
        await get(port, f"/publish?count={BATCH}")
        await gather([reader.read_to((2 * number - 1, "a", number)) for reader in readers])
        longest = max(longest, time.monotonic() - published_at)
        peak = max(peak, server_process.memory_info().rss)
        if number == HISTORY:  # the log is full, so from now on only other buffers take more memory
            before = peak
    seconds = time.monotonic() - began
    now = await until(port, lambda now: now["closed"].get("timed_out"))
    growth = (max(peak, server_process.memory_info().rss) - before) / 2**20
    published = rows(now)
    of_a = [row for row in published if row[1] == "a"]
    for reader in readers:
        assert (reader.seen, reader.resets) == (of_a, [])

    # The stuck clients begin to read.
    with pytest.raises(ConnectionResetError):
        await impatient.read_until(lambda: False)
    await gather(
        [patient.read_until(lambda: bool(patient.resets)), strict.read_until(lambda: strict.connection.complete)]
    )
    await get(port, "/publish?count=5")
    now = await until(port, lambda now: now["closed"].get("overflowed"))
    await patient.read_to(rows(now)[-1])

    print(
        f"{server}: {CLIENTS} clients; {EVENTS} events in {seconds:.1f} s, each {BATCH} of them read by all within "
        f"{longest:.2f} s; {growth:.1f} MB more; the stuck clients got {len(strict.seen)} events (close), "
        f"{patient.resets} (reset); {now['closed']}"
    )
    assert growth < 20  # one buffer of all events would take 45 MB
    ((count, goes_on_at, data),) = patient.resets
    assert (data, goes_on_at) == ('{"reason":"overflow"}', published[-1][0])
    assert 0 < count < len(published) - HISTORY
    assert patient.seen[:count] == published[:count]
    assert patient.seen[count:] == [row for row in rows(now) if row[0] > goes_on_at]
    assert len(patient.seen) == count + 10
    assert strict.connection.ending == b"0\r\n\r\n"
    assert 0 < len(strict.seen) < EVENTS - HISTORY
    assert strict.seen == rows(now["closing"])[: len(strict.seen)]
    assert strict.resets == []
    assert (now["closed"]["overflowed"], now["closed"]["timed_out"]) == (1, 1)


# Django


def test_synchronous_views_can_publish(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")  # so that the loop raises if another thread calls it directly
    with running(SERVERS[0], "channel_app:django", log) as port, ExitStack() as stack:
        run(read_what_views_publish(port, [Reader(stack) for _ in range(5)]), log)


async def read_what_views_publish(port: int, readers: list[Reader]) -> None:
    await gather([reader.begin(port, "/events") for reader in readers])
    threads = await gather([get(port, f"/{view}/{publisher}") for publisher, view in PUBLISHERS.items()])
    assert len(set(threads)) == len(PUBLISHERS)
    assert b"MainThread" not in threads
    total = len(PUBLISHERS) * EACH
    at_once = rows(await until(port, lambda now: len(now["published"]) == total))
    turns = sum(one[1] != other[1] for one, other in pairwise(at_once))
    print(f"{total} events of {len(threads)} threads, which took {turns} turns")
    assert turns > len(PUBLISHERS)  # the threads did publish at the same time
    await gather([reader.read_to(at_once[-1]) for reader in readers])

    await get(port, "/thread/alone")  # no other publisher wakes the clients now
    await gather([reader.read_to((total + EACH, "alone", EACH)) for reader in readers])
    published = rows(await figures(port))
    assert [number for number, _, _ in published] == list(range(1, total + EACH + 1))
    for publisher in [*PUBLISHERS, "alone"]:
        assert [count for _, name, count in published if name == publisher] == list(range(1, EACH + 1))
    for reader in readers:
        assert (reader.seen, reader.resets) == (published, [])
