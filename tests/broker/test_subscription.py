"""`Subscription`: every subscriber gets the events after its position in order and once, or a ``reset``."""

import json
import random
from contextlib import aclosing
from itertools import count
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from broker_clients import id_of, offset_of
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_sse import (
    Broker,
    EventDecoder,
    EventSourceResponse,
    ServerSentEvent,
    StreamClosedError,
    StreamRegistry,
    Subscription,
    create_app,
)
from asgi_sse.broker.patterns import pattern_test
from asgi_sse.testing import open_stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_sse.broker.pull_source import SubscriptionSource

pytestmark = pytest.mark.anyio

CHANNELS = ["a", "a.x", "a.y", "b.x"]
PATTERNS = [["a"], ["a.x"], ["a.*"], ["**"], ["a", "b.x"], ["a.x", "a.*"], ["*.x"], ["b.**", "a"]]


# Against a model


class Client:
    """A client that checks that it gets each event it wants, once and in order."""

    def __init__(self, chance: random.Random) -> None:
        self.patterns = chance.choice(PATTERNS)
        self.tests = [pattern_test(pattern) for pattern in self.patterns]
        self.even = chance.random() < 0.3  # whether its filter accepts even offsets only
        self.last_id = ""
        self.wanted: list[int] = []  # the offsets that it has to get from the current broker
        self.subscription: Subscription | None = None
        self.source: SubscriptionSource | None = None
        self.decoder = EventDecoder()
        self.as_stream = chance.random() < 0.7
        self.dirty = True
        self.resets = 0

    def wants(self, channel: str, offset: int) -> bool:
        return any(test(channel) for test in self.tests) and not (self.even and offset % 2)

    def connect(self, broker: Broker) -> None:
        keep: Callable[[ServerSentEvent], bool] | None = None
        if self.even:
            keep = lambda event: offset_of(event) % 2 == 0  # noqa: E731
        fresh = not self.last_id
        self.subscription = broker.subscribe(*self.patterns, last_event_id=self.last_id or None, filter=keep)
        self.decoder = EventDecoder()
        self.dirty = True
        if fresh:
            self.wanted = []
        if self.as_stream:
            self.source = self.subscription.as_pull_source()
            self.source.attach(self.wake)

    def wake(self) -> None:
        self.dirty = True

    def disconnect(self) -> None:
        if self.source is not None:
            self.source.detach()
        elif self.subscription is not None:
            self.subscription.close()
        self.subscription = self.source = None

    async def read(self, limit: int) -> None:
        if self.subscription is None:
            return
        if self.source is not None:
            assert self.dirty or not self.source.ready, "there is something to read, but the client was not woken"
            if self.source.ready:
                for event in self.decoder.feed(self.source.take(limit)):
                    self.got(event)
                self.last_id = self.decoder.last_event_id or self.last_id
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.read_one, self.subscription)
                for _ in range(5):  # enough turns to read an event if there is one
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            self.last_id = self.subscription.last_event_id

    async def read_one(self, subscription: Subscription) -> None:
        self.got(await subscription.__anext__())

    def got(self, event: ServerSentEvent) -> None:
        if event.event == "reset":
            self.resets += 1
            assert json.loads(str(event.data))["reason"] in {"expired", "unknown", "epoch", "overflow"}
            position = offset_of(event)
            self.wanted = [offset for offset in self.wanted if offset > position]
            return
        assert self.wanted, f"{event!r} was not wanted, or was sent before"
        assert offset_of(event) == self.wanted.pop(0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_clients_see_each_event_once(seed: int) -> None:
    anyio.run(run_random_actions, random.Random(seed))


async def run_random_actions(chance: random.Random) -> None:  # noqa: PLR0912
    def start() -> Broker:
        return Broker(
            history=chance.choice([2, 5, 100]),
            max_bytes=chance.choice([1000, 10**6]),
            max_channels=chance.choice([1, 2, 100]),
        )

    broker = start()
    clients = [Client(chance) for _ in range(6)]
    for _ in range(200):
        action = chance.random()
        client = chance.choice(clients)
        if action < 0.45:
            channel = chance.choice(CHANNELS)
            event_id = await broker.publish(channel, "x" * chance.choice([1, 40]))
            offset = int(event_id.partition("-")[2])
            for other in clients:
                if (other.last_id or other.subscription) and other.wants(channel, offset):
                    other.wanted.append(offset)
        elif action < 0.85:
            await client.read(chance.choice([1, 50, 10**6]))
        elif action < 0.99:
            if client.subscription is None:
                client.connect(broker)
            else:
                client.disconnect()
        else:  # a restart: all earlier events are gone
            for other in clients:
                other.disconnect()
                other.wanted = []
            broker = start()
    for client in clients:  # in the end, every client connects and reads everything
        if client.subscription is None:
            client.connect(broker)
        for _ in range(1000):
            await client.read(10**6)
        assert client.wanted == []
        client.disconnect()
    assert [broker.subscribers(channel) for channel in CHANNELS] == [0] * len(CHANNELS)


# As an async iterable


async def test_subscription_is_an_async_iterable() -> None:
    broker = Broker()
    await broker.publish("a", "before")
    subscription = broker.subscribe("a")
    await broker.publish("a", "published since it was made")
    seen: list[str | None] = []

    async def read() -> None:
        async for event in subscription:
            seen.append(event.data)  # noqa: PERF401 (a list that is read while it grows)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.sleep(0.1)
        await broker.publish("a", "live")
        await anyio.sleep(0.1)
        assert subscription.last_event_id == id_of(broker, 3)
        await subscription.aclose()
    assert seen == ["published since it was made", "live"]
    assert broker.subscribers("a") == 0


async def test_replay_and_live_events_are_one_sequence() -> None:
    broker = Broker()
    numbers = count()
    first = await broker.publish("a", next(numbers))
    for _ in range(199):
        await broker.publish("a", next(numbers))
    seen = []
    async for event in broker.subscribe("a", last_event_id=first):
        seen.append(int(str(event.data)))
        if seen[-1] % 10 == 0 and len(seen) < 400:
            for _ in range(10):
                await broker.publish("a", next(numbers))
        if len(seen) == 399:
            break
    assert seen == list(range(1, 400))


async def test_overflow_close_ends_the_loop() -> None:
    broker = Broker(history=2, overflow="close")
    subscription = broker.subscribe("a")
    await broker.publish("a", 0)
    assert (await subscription.__anext__()).data == "0"
    for number in range(10):
        await broker.publish("a", number)
    assert [event async for event in subscription] == []


async def test_loop_that_publishes_what_it_reads_yields_to_others() -> None:
    broker = Broker()
    async with broker.subscribe("a") as subscription:
        with anyio.move_on_after(1):
            await broker.publish("a", 0)
            read = 0
            async for _ in subscription:
                read += 1
                broker.publish_nowait("a", 0)
                if read > 100_000:
                    pytest.fail("no other task had a turn")
                if read % 1000 == 0:
                    await anyio.sleep(0.2)


@pytest.mark.parametrize("how", ["closed", "drained"])
async def test_loop_ends_with_the_broker(how: str) -> None:
    broker, registry = Broker(), StreamRegistry()
    create_app({}, registry=registry, broker=broker)

    async def read() -> None:
        assert [event async for event in broker.subscribe("a")] == []

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.sleep(1)
        assert broker.subscribers("a") == 1
        if how == "drained":
            registry.begin_drain()
        else:
            async with broker:
                pass
    assert broker.subscribers("a") == 0


async def test_leaving_a_loop_closes_the_subscription() -> None:
    broker = Broker()
    for number in range(3):
        await broker.publish("a", number)

    async def leave_with(how: str) -> None:
        async for event in broker.subscribe("a", last_event_id=None):
            if how == "break":
                break
            raise ValueError(event)

    for how in ("break", "error"):
        async with anyio.create_task_group() as tasks:

            async def run(how: str = how) -> None:
                if how == "break":
                    await leave_with(how)
                else:
                    with pytest.raises(ValueError, match="ServerSentEvent"):
                        await leave_with(how)

            tasks.start_soon(run)
            await anyio.wait_all_tasks_blocked()
            assert broker.subscribers("a") == 1
            await broker.publish("a", "x")
        await anyio.wait_all_tasks_blocked()
        assert broker.subscribers("a") == 0


async def test_iterator_of_a_subscription_is_iterable_and_can_be_closed() -> None:
    broker = Broker()
    subscription = broker.subscribe("a")
    await broker.publish("a", "x")
    iterator: Any = aiter(subscription)
    async with aclosing(iterator):
        async for event in iterator:
            assert event.data == "x"
            assert broker.subscribers("a") == 1
            break
    assert broker.subscribers("a") == 0
    assert [event async for event in subscription] == []


@pytest.mark.real_time
async def test_loop_ends_if_another_event_loop_closes_its_subscription() -> None:
    broker = Broker()
    subscription = broker.subscribe("a")
    seen: list[str | None] = []

    async def read() -> None:
        seen.extend([event.data async for event in subscription])

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            await broker.publish("a", "x")
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(anyio.run, subscription.aclose)
    assert seen == ["x"]
    assert broker.subscribers("a") == 0


# One reader


async def test_subscription_has_one_reader() -> None:
    broker = Broker()
    subscription = broker.subscribe("a")
    async with open_stream(EventSourceResponse(subscription)) as stream:
        await stream.read()
        with pytest.raises(StreamClosedError, match="read by a response"):
            await subscription.__anext__()
        with pytest.raises(StreamClosedError, match="was read before"):
            async with open_stream(EventSourceResponse(subscription)):
                pass


@pytest.mark.parametrize("begun", [True, False])
async def test_closing_a_subscription_ends_its_stream(begun: bool) -> None:
    broker = Broker()
    subscription = broker.subscribe("a")
    if begun:
        async with open_stream(EventSourceResponse(subscription)) as stream:
            await stream.read()
            await broker.publish("a", "unread")
            await subscription.aclose()
            assert [event async for event in stream] == []
            assert stream.complete
    else:
        await subscription.aclose()
        with pytest.raises(StreamClosedError, match="closed before it was read"):
            async with open_stream(EventSourceResponse(subscription)):
                pass
        assert [event async for event in subscription] == []
    assert broker.subscribers("a") == 0


async def test_closed_subscription_cannot_be_read() -> None:
    broker = Broker()
    async with broker.subscribe("a") as subscription:
        pass
    assert [event async for event in subscription] == []
    with pytest.raises(StreamClosedError):
        async with open_stream(EventSourceResponse(subscription)):
            pass


# Filters and patterns


async def test_error_of_a_filter_is_reported_as_it_is() -> None:
    broker, registry = Broker(), StreamRegistry()

    def broken(event: ServerSentEvent) -> bool:
        if event.data == "1":
            raise ConnectionError("the cache is down")
        return True

    response = EventSourceResponse(broker.subscribe("a", filter=broken), registry=registry)
    with pytest.raises(ConnectionError, match="the cache is down"):
        async with open_stream(response) as stream:
            for number in range(3):
                broker.publish_nowait("a", number)
            assert (await stream.receive()).data == "0"
            await stream.receive()
    assert not stream.complete
    assert registry.statistics().closed == {"failed": 1}
    async with broker.subscribe("a", filter=broken) as subscription:
        for number in range(2):
            broker.publish_nowait("a", number)
        await subscription.__anext__()
        before = subscription.last_event_id
        with pytest.raises(ConnectionError):
            await subscription.__anext__()
        assert subscription.last_event_id == before  # a client that resumes gets the event again


async def test_wide_pattern_reads_the_sequence_of_all_channels() -> None:
    broker = Broker()
    first = await broker.publish("a.0", "x")
    for number in range(300):
        broker.publish_nowait(f"{'ab'[number % 2]}.{number}", "x" * 1000)
    async with open_stream(EventSourceResponse(broker.subscribe("a.*", last_event_id=first))) as stream:
        events = [await stream.receive() for _ in range(150)]
    assert [offset_of(event) for event in events] == list(range(2, 302, 2))


async def test_lag_of_many_channels_is_an_upper_limit() -> None:
    broker = Broker()
    async with broker.subscribe(*(f"a.{number}" for number in range(9))) as subscription:
        with anyio.move_on_after(0):
            await anext(subscription)
        for name in ("a.1", "other", "other", "a.2"):
            await broker.publish(name, "x")
        assert broker.statistics().lag == 4
        assert (await anext(subscription)).data == "x"
        assert broker.statistics().lag == 1
        await anext(subscription)
        assert broker.statistics().lag == 0


async def test_pattern_gets_the_events_of_any_number_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_sse.broker.dispatcher._MAX_MATCHING", 10)
    broker = Broker()
    async with broker.subscribe("a.*") as subscription:
        for number in range(100):
            await broker.publish(f"a.{number}", number)
            await broker.publish(f"b.{number}", number)
            with anyio.fail_after(1):
                assert (await anext(subscription)).data == str(number)
            assert len(broker._dispatcher._matching) <= 11  # what is remembered of names is bounded


async def test_channel_object_is_never_a_pattern() -> None:
    broker = Broker()
    async with broker.subscribe(broker.channel("a"), "b.*") as subscription:
        assert subscription.names == ("a", "b.*")
    with pytest.raises(ValueError, match=r"got 'user\.\*'; only patterns may have"):
        broker.channel(f"user.{'*'}")


async def test_pattern_forgets_channels_that_the_log_forgot() -> None:
    broker = Broker(max_channels=10)
    async with broker.subscribe("**") as subscription:
        with anyio.move_on_after(0.1):
            await subscription.__anext__()
        for number in range(5000):
            broker.publish_nowait(f"a.{number}", "x")
        assert len(broker._dispatcher._patterns["**"].channels) < 500
