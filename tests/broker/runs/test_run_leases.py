"""Runs that other processes hold, end or take over, on a broker whose leases the test sets."""

import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from run_clients import words, words_and_end

from asgi_sse import Broker, BrokerError, Run, ServerSentEvent, Subscription
from asgi_sse.broker.backends.base import Publication, RunLease

pytestmark = pytest.mark.anyio

CHECK_S = 10.0  # seconds between two checks of the leases


class Server:
    """Stands in for the server of a broker in memory. Other processes are what the test does.

    Attributes:
        leases: The leases that the server has.
        during_find: Called while a lease is looked up, after the server has read it.
        during_sync: Called while this process catches up with the log.
        renewed: The names of the runs whose lease this process has renewed.
        refuses: Whether another process holds all runs.
    """

    def __init__(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broker = broker
        self.dispatcher = broker._dispatcher
        self.dispatcher.upstream = self
        self.leases: dict[str, RunLease] = {}
        self.during_find: Callable[[], Awaitable[Any]] = anyio.lowlevel.checkpoint
        self.during_sync: Callable[[], Awaitable[Any]] = anyio.lowlevel.checkpoint
        self.renewed: list[str] = []
        self.refuses = False
        monkeypatch.setattr(broker._backend, "is_alone", False)
        monkeypatch.setattr(broker._backend, "find_lease", self.find_lease)
        monkeypatch.setattr(broker._backend, "renew_lease", self.renew_lease)

    def hold(self, name: str, start: int = 0, **fields: Any) -> RunLease:
        """Another process holds the run `name`, or has ended it."""
        fields.setdefault("epoch", self.dispatcher.log.epoch)
        self.leases[name] = RunLease("other", start=start, max_bytes=10_000, ttl=60, **fields)
        return self.leases[name]

    def publish(self, name: str, data: str, end: str | None = None) -> None:
        """Another process publishes an event of a run."""
        event = ServerSentEvent(data, event=None if end is None else "end")
        self.dispatcher.publish(name, event, end=end)

    async def find_lease(self, name: str) -> RunLease | None:
        lease = self.leases.get(name)
        await self.during_find()
        return lease

    async def renew_lease(self, name: str, lease: RunLease) -> bool:
        await anyio.lowlevel.checkpoint()
        self.renewed.append(name)
        return not self.refuses

    async def sync(self) -> None:
        await self.during_sync()

    async def recall(self, channels: list[str]) -> None:
        pass


class Lock:
    """The lock of a dispatcher. Before it is taken next, `first` is called, as if another thread had come first."""

    def __init__(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.first: Callable[[], object] | None = None
        self._lock = threading.Lock()
        monkeypatch.setattr(broker._dispatcher, "lock", self)

    def __enter__(self) -> None:
        first, self.first = self.first, None
        if first is not None:
            first()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


async def data_of(subscription: Subscription) -> list[str | None]:
    """Return the data of all events until the subscription ends. A reset is "reset"."""
    with anyio.fail_after(1000):
        return [event.event if event.event == "reset" else event.data async for event in subscription]


async def find(broker: Broker, name: str) -> Run:
    found = await broker.find_run(name)
    assert found is not None
    return found


# Runs of other processes


async def test_run_without_a_lease_is_lost_after_two_checks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        server.hold("r")
        run = await find(broker, "r")
        server.publish("r", "0")
        server.leases.clear()
        await anyio.sleep(1.5 * CHECK_S)
        assert run.outcome is None  # the holder may have been disconnected
        assert await data_of(run.subscribe()) == ["0", '{"reason":"lost"}']
        assert await run.wait() == "lost"
        assert server.renewed == ["r"]
        await broker.close("watch")
    assert "run r is ended as lost: its process did not renew the lease" in caplog.text


async def test_run_whose_lease_comes_back_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        lease = server.hold("r")
        run = await find(broker, "r")
        await anyio.sleep(CHECK_S / 2)
        for _ in range(3):  # never missing at two checks in a row
            server.leases.clear()
            await anyio.sleep(CHECK_S)
            server.leases["r"] = lease
            await anyio.sleep(CHECK_S)
        assert (run.outcome, server.renewed) == (None, [])
        await broker.close("watch")


async def test_end_that_arrives_at_the_last_moment_wins_over_a_missing_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        server.hold("r")
        run = await find(broker, "r")
        server.leases.clear()

        async def deliver_end() -> None:
            server.publish("r", "the end", end="finished")

        server.during_sync = deliver_end
        assert await data_of(run.subscribe()) == ["the end"]
        await anyio.sleep(3 * CHECK_S)
        assert (run.outcome, server.renewed) == ("finished", [])
        assert broker.statistics().published == 0
        await broker.close("watch")


async def test_process_that_is_slower_to_take_a_lost_run_over_publishes_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        server.hold("r")
        run = await find(broker, "r")
        server.leases.clear()
        server.refuses = True
        await anyio.sleep(2.5 * CHECK_S)
        assert (run.outcome, server.renewed, broker.statistics().published) == (None, ["r"], 0)
        server.publish("r", "end of the other process", end="lost")
        assert await data_of(run.subscribe()) == ["end of the other process"]
        await broker.close("watch")


@pytest.mark.parametrize(
    ("lease", "outcome"),
    [
        ({"outcome": "finished", "final": 2}, "finished"),  # its last event was lost
        ({"outcome": "cancelled", "final": 9, "epoch": "old"}, "cancelled"),  # it ended in an earlier log
        ({"start": 2}, "lost"),  # a later run has its name
    ],
)
async def test_lease_ends_a_run_whose_last_event_does_not_come(
    monkeypatch: pytest.MonkeyPatch, lease: dict[str, Any], outcome: str
) -> None:
    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        server.hold("r")
        run = await find(broker, "r")
        server.publish("r", "0")
        server.publish("other", "x")
        server.hold("r", **lease)
        assert await data_of(run.subscribe()) == ["0"]
        assert await run.wait() == outcome
        await broker.close("watch")


async def test_lease_of_an_earlier_run_does_not_end_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        for _ in range(3):
            server.publish("other", "x")
        later = server.hold("r", start=3)
        run = await find(broker, "r")
        server.hold("r", start=0, outcome="finished", final=2)  # the server was rolled back
        await anyio.sleep(3 * CHECK_S)
        assert run.outcome is None
        server.leases["r"] = later
        server.publish("r", "0", end="finished")
        assert await data_of(run.subscribe()) == ["0"]
        await broker.close("watch")


async def test_end_that_arrives_while_the_lease_is_looked_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        server.hold("r")
        run = await find(broker, "r")
        server.hold("r", outcome="cancelled", final=7)

        async def deliver_end() -> None:
            server.publish("r", "the end", end="finished")

        server.during_find = deliver_end
        assert await data_of(run.subscribe()) == ["the end"]
        await anyio.sleep(CHECK_S)
        assert (run.outcome, run.final) == ("finished", 1)
        await broker.close("watch")


async def test_check_that_fails_is_repeated(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "asgi_sse")
    errors: list[Exception] = [BrokerError("no answer"), LookupError("a bug")]

    async def fail() -> None:
        if errors:
            raise errors.pop(0)

    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        server.hold("r")
        run = await find(broker, "r")
        server.hold("r", outcome="finished", final=1)
        server.during_find = fail
        with anyio.fail_after(3.5 * CHECK_S):
            assert await run.wait() == "finished"
        await broker.close("watch")
    failed = [record for record in caplog.records if "could not be checked" in record.getMessage()]
    assert [(record.levelname, vars(record)["sse_run"]) for record in failed] == [("DEBUG", "r"), ("ERROR", "r")]
    assert failed[0].getMessage() == "run r could not be checked; the next check follows: no answer"


async def test_broker_reports_that_it_no_longer_watches_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class FatalError(BaseException):
        pass

    async def fail() -> None:
        raise FatalError

    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        server.hold("r")
        run = await find(broker, "r")
        server.during_find = fail
        await anyio.sleep(1.5 * CHECK_S)
        (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert record.getMessage() == "the runs of other processes are not watched any more"
        assert record.exc_info is not None
        assert record.exc_info[0] is FatalError
        server.publish("r", "0", end="finished")  # events still arrive
        assert await run.wait() == "finished"
        await broker.close("watch")


@pytest.mark.parametrize("closes", [False, True])
async def test_wait_returns_the_outcome_of_a_run_that_ends_at_that_moment(
    monkeypatch: pytest.MonkeyPatch, *, closes: bool
) -> None:
    """It ends in another thread, just before the wait begins or just before the broker would end the wait."""
    outcomes: list[str] = []

    async def wait() -> None:
        outcomes.append(await run.wait())

    broker = Broker()
    server, lock = Server(broker, monkeypatch), Lock(broker, monkeypatch)
    await broker.open("me")
    server.hold("r")
    run = await find(broker, "r")
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            if closes:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
            lock.first = partial(server.publish, "r", "the end", end="finished")
            if not closes:
                await wait()
            await broker.close("me")
    assert outcomes == ["finished"]
    assert lock.first is None


# Lookups that a change overtakes


@pytest.mark.parametrize("knows", [True, False])
async def test_run_found_while_the_epoch_changes_gives_a_reset_and_the_rest(
    monkeypatch: pytest.MonkeyPatch, *, knows: bool
) -> None:
    """The lease is of the log before, or of the next one, of which this process does not know yet."""
    broker = Broker()
    server = Server(broker, monkeypatch)
    for _ in range(5):
        server.publish("other", "x")
    server.hold("r", start=5, epoch=server.dispatcher.log.epoch if knows else "next")

    async def replace_log() -> None:
        server.dispatcher.restart("next", 0, floor=0)

    if knows:
        server.during_find = replace_log
    run = await find(broker, "r")
    reader = run.subscribe()
    if not knows:
        await replace_log()
    assert not run.whole
    server.publish("r", "0")
    server.publish("r", "1", end="finished")
    for subscription in (reader, run.subscribe()):
        assert await data_of(subscription) == ["reset", "0", "1"]
    assert await run.wait() == "finished"


async def test_later_run_replaces_the_one_that_a_slower_lookup_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()
    server = Server(broker, monkeypatch)
    found: list[Run] = []
    seen: list[str | None] = []

    async def look_up() -> None:
        found.append(await find(broker, "r"))

    async def read(run: Run) -> None:
        seen.extend(await data_of(run.subscribe()))

    async with anyio.create_task_group() as tasks:
        server.publish("other", "x")
        server.hold("r", start=1)
        proceed = anyio.Event()
        server.during_find = proceed.wait
        tasks.start_soon(look_up)
        await anyio.wait_all_tasks_blocked()
        server.hold("r", start=0)  # as a server has it that is behind
        server.during_find = anyio.lowlevel.checkpoint
        earlier = await find(broker, "r")
        tasks.start_soon(read, earlier)
        await anyio.wait_all_tasks_blocked()
        proceed.set()
        with anyio.fail_after(5):
            assert await earlier.wait() == "lost"
    (later,) = found
    assert later is broker.runs["r"] is not earlier
    assert (later.start, later.outcome, seen) == (1, None, [])
    server.publish("r", "0", end="finished")
    assert await data_of(later.subscribe()) == ["0"]


async def test_run_is_stopped_here_if_a_lookup_finds_a_later_run_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = anyio.Event()

    async def source() -> AsyncIterator[str]:
        try:
            yield "0"
            await anyio.sleep_forever()
        finally:
            stopped.set()

    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        proceed = anyio.Event()
        found: list[Run] = []

        async def look_up() -> None:
            found.append(await find(broker, "r"))

        async with anyio.create_task_group() as tasks:
            server.during_find = proceed.wait
            server.hold("r", start=5)
            tasks.start_soon(look_up)
            await anyio.wait_all_tasks_blocked()
            run = await broker.run("r", source())
            await anyio.wait_all_tasks_blocked()
            for _ in range(4):
                server.publish("other", "x")
            proceed.set()
        with anyio.fail_after(5):
            await stopped.wait()
        await anyio.wait_all_tasks_blocked()
        assert run.outcome == "lost"
        assert found == [broker.runs["r"]]
        server.publish("r", "of the later run", end="finished")
        assert await data_of(found[0].subscribe()) == ["of the later run"]
        assert broker.statistics().published == 1  # the run has published its first event, and no end


async def test_end_that_cannot_be_published_does_not_end_a_later_run_of_its_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Broker()
    server = Server(broker, monkeypatch)
    publish, refused, proceed = broker._backend.publish, anyio.Event(), anyio.Event()
    found: list[Run] = []

    async def refuse_the_end(publication: Publication, *, wait: bool = False) -> str:
        if publication.end is None:
            return await publish(publication, wait=wait)
        await refused.wait()
        raise BrokerError("no space left")

    async def look_up() -> None:
        found.append(await find(broker, "r"))

    monkeypatch.setattr(broker._backend, "publish", refuse_the_end)
    async with anyio.create_task_group() as tasks:
        server.during_find = proceed.wait
        server.hold("r", start=5)
        tasks.start_soon(look_up)
        await anyio.wait_all_tasks_blocked()
        run = await broker.run("r", ["x"])
        await anyio.wait_all_tasks_blocked()
        proceed.set()
        await anyio.wait_all_tasks_blocked()
        refused.set()
        await anyio.wait_all_tasks_blocked()
    assert "the end of run r could not be published: no space left" in caplog.messages
    assert found == [broker.runs["r"]]
    assert (run.outcome, found[0].outcome) == ("lost", None)


@pytest.mark.parametrize("closable", [True, False])
async def test_run_that_is_joined_does_not_begin_the_other_source(*, closable: bool) -> None:
    began: list[str] = []

    async def generator() -> AsyncIterator[str]:
        began.append("generator")
        yield "x"

    class Source:
        def __aiter__(self) -> "Source":
            return self

        async def __anext__(self) -> str:
            began.append("iterator")
            raise StopAsyncIteration

    broker = Broker()
    run = await broker.run("r", words(2))
    assert await broker.run("r", generator() if closable else Source(), join=True) is run
    assert await data_of(run.subscribe()) == words_and_end(2)
    assert began == []


# The last event of a run of this process


@pytest.mark.parametrize("what", ["nothing", "its end", "a later run", "the event"])
async def test_end_that_was_acknowledged_and_lost_is_published_again_unless_others_know_of_it(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        publish = broker._backend.publish
        lost: list[Publication] = []

        async def publish_and_lose(publication: Publication, *, wait: bool = False) -> str:
            if publication.end is not None and not lost:
                lost.append(publication)
                return "lost-2"
            return await publish(publication, wait=wait)

        monkeypatch.setattr(broker._backend, "publish", publish_and_lose)
        run = await broker.run("r", ["0"])
        await anyio.wait_all_tasks_blocked()
        assert run.outcome is None
        server.publish("other", "x")

        async def deliver_end() -> None:
            server.publish("r", "the end", end="finished")

        if what == "its end":
            server.hold("r", outcome="finished", final=2)
        elif what == "a later run":
            server.hold("r", start=2)
        elif what == "the event":
            server.during_find = deliver_end
        expected = {
            "nothing": ["0", '{"reason":"finished"}'],
            "its end": ["0"],
            "a later run": ["0"],
            "the event": ["0", "the end"],
        }
        assert await data_of(run.subscribe()) == expected[what]
        assert await run.wait() == ("lost" if what == "a later run" else "finished")
        await anyio.sleep(3 * CHECK_S)
        assert len(expected[what]) == len(list(server.dispatcher.log.entries(["r"], 0)))
        await broker.close("watch")


async def test_lost_run_whose_clean_up_hangs_publishes_nothing_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = anyio.Event()

    async def source() -> AsyncIterator[str]:
        try:
            yield "0"
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await released.wait()

    async with Broker() as broker:
        server = Server(broker, monkeypatch)
        await broker.open("watch")
        run = await broker.run("r", source())
        await anyio.wait_all_tasks_blocked()
        server.refuses = True
        await anyio.sleep(CHECK_S + 15)  # the check finds the other holder, and the clean-up has 10 s
        assert "another process has taken it over" in caplog.text
        assert "was not cleaned up within 10 s" in caplog.text
        assert (run.publisher, run.outcome) == (None, None)
        server.publish("r", "end of the other process", end="lost")
        assert await data_of(run.subscribe()) == ["0", "end of the other process"]
        released.set()
        await anyio.wait_all_tasks_blocked()
        assert broker.statistics().last_event_id.endswith("-2")
        await broker.close("watch")


# Runs that are forgotten


async def test_ttl_of_an_ended_run_does_not_forget_the_next_run_of_its_name() -> None:
    broker = Broker(history=1)
    first = await broker.run("r", ["x"], ttl=5)
    await first.wait()
    second = await broker.run("r", words(20))
    await anyio.sleep(10)
    assert broker.runs["r"] is second
    assert await data_of(second.subscribe()) == words_and_end(20)


async def test_max_lifetime_does_not_keep_a_run_that_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker()
    run = await broker.run("r", ["x"], ttl=0, max_lifetime=100)
    assert await run.wait() == "finished"
    reference = weakref.ref(run)
    del run
    await anyio.sleep(50)
    gc.collect()
    assert reference() is None
    await anyio.sleep(100)
    assert caplog.records == []


async def test_ttl_of_a_run_does_not_keep_its_broker(caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker()
    run = await broker.run("r", ["x"], ttl=100)
    assert await run.wait() == "finished"
    references: list[weakref.ref[Any]] = [weakref.ref(broker), weakref.ref(run)]
    del broker, run
    await anyio.sleep(50)
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    await anyio.sleep(100)
    assert caplog.records == []


def test_ended_run_of_a_closed_event_loop_is_forgotten() -> None:
    broker = Broker()

    async def run_and_wait(name: str) -> None:
        assert await (await broker.run(name, words(1, 0), ttl=1000)).wait() == "finished"

    anyio.run(run_and_wait, "one")
    assert list(broker.runs) == ["one"]
    anyio.run(run_and_wait, "two")
    assert list(broker.runs) == ["two"]  # nothing else would forget the first one, whose timer was in its loop
