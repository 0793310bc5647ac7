"""Channels: every subscriber gets what was published behind its place, in order and once, or is told that it cannot."""

import gc
import json
import random
import re
import sys
import threading
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_sse import (
    Broker,
    BrokerError,
    EventDecoder,
    EventSourceResponse,
    InvalidEventError,
    ServerSentEvent,
    SSEMiddleware,
    StreamClosedError,
    StreamRegistry,
    Subscription,
    create_app,
)
from asgi_sse.broker.patterns import pattern_test
from asgi_sse.testing import open_stream

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

CHANNELS = ["a", "a.x", "a.y", "b.x"]
PATTERNS = [["a"], ["a.x"], ["a.*"], ["**"], ["a", "b.x"], ["a.x", "a.*"], ["*.x"], ["b.**", "a"]]


def number_of(event: ServerSentEvent) -> int:
    assert event.id is not None
    return int(event.id.partition("-")[2])


# Against a model


class Client:
    """One client: what it should have seen, and what it has."""

    def __init__(self, chance: random.Random) -> None:
        self.patterns = chance.choice(PATTERNS)
        self.tests = [pattern_test(pattern) for pattern in self.patterns]
        self.even = chance.random() < 0.3  # a filter
        self.last_id = ""
        self.wanted: list[int] = []  # of the broker that runs
        self.subscription: Subscription | None = None
        self.decoder = EventDecoder()
        self.as_stream = chance.random() < 0.7
        self.dirty = True
        self.resets = 0

    def wants(self, channel: str, number: int) -> bool:
        return any(test(channel) for test in self.tests) and not (self.even and number % 2)

    def connect(self, broker: Broker) -> None:
        keep: Callable[[ServerSentEvent], bool] | None = None
        if self.even:
            keep = lambda event: number_of(event) % 2 == 0  # noqa: E731
        fresh = not self.last_id
        self.subscription = broker.subscribe(*self.patterns, last_event_id=self.last_id or None, filter=keep)
        self.decoder = EventDecoder()
        self.dirty = True
        if fresh:
            self.wanted = []
        if self.as_stream:
            self.subscription.as_pull_source().attach(self.wake)

    def wake(self) -> None:
        self.dirty = True

    def disconnect(self) -> None:
        if self.subscription is not None:
            self.subscription.detach()
            self.subscription = None

    async def read(self, limit: int) -> None:
        if self.subscription is None:
            return
        if self.as_stream:
            assert self.dirty or not self.subscription.ready, "there is something to read, and nobody was told"
            if self.subscription.ready:
                for event in self.decoder.feed(self.subscription.take(limit)):
                    self.got(event)
                self.last_id = self.decoder.last_event_id or self.last_id
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.read_one, self.subscription)
                for _ in range(5):  # if there is anything to read, that is enough
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            self.last_id = self.subscription.last_event_id

    async def read_one(self, subscription: Subscription) -> None:
        self.got(await subscription.__anext__())

    def got(self, event: ServerSentEvent) -> None:
        if event.event == "reset":
            self.resets += 1
            assert json.loads(str(event.data))["reason"] in {"expired", "unknown", "epoch", "overflow"}
            tail = number_of(event)
            self.wanted = [number for number in self.wanted if number > tail]
            return
        assert self.wanted, f"{event!r} was not to be sent, or not again"
        assert number_of(event) == self.wanted.pop(0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_interleaving(seed: int) -> None:
    anyio.run(any_interleaving, random.Random(seed))


async def any_interleaving(chance: random.Random) -> None:  # noqa: PLR0912
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
            number = int(event_id.partition("-")[2])
            for other in clients:
                if (other.last_id or other.subscription) and other.wants(channel, number):
                    other.wanted.append(number)
        elif action < 0.85:
            await client.read(chance.choice([1, 50, 10**6]))
        elif action < 0.99:
            if client.subscription is None:
                client.connect(broker)
            else:
                client.disconnect()
        else:  # a restart: what was published before is gone
            for other in clients:
                other.disconnect()
                other.wanted = []
            broker = start()
    for client in clients:  # in the end everybody comes, and reads all there is
        if client.subscription is None:
            client.connect(broker)
        for _ in range(1000):
            await client.read(10**6)
        assert client.wanted == []
        client.disconnect()
    assert [broker.subscribers(channel) for channel in CHANNELS] == [0] * len(CHANNELS)


# As a stream


async def test_events_reach_every_client_with_their_ids() -> None:
    broker = Broker()
    app = create_app({"/a": broker.channel("a")})
    async with open_stream(app, "/a") as one, open_stream(app, "/a") as other:
        assert await broker.channel("a").publish({"data": "first", "event": "kind"}) == one_id(broker, 1)
        await broker.publish("b", "not for them")
        await broker.publish("a", "second")
        for stream in (one, other):
            first, second = await stream.receive(), await stream.receive()
            assert (first.data, first.event, first.id) == ("first", "kind", one_id(broker, 1))
            assert (second.data, second.id) == ("second", one_id(broker, 3))
        assert broker.subscribers("a") == 2
        assert broker.channel("a").subscribers == 2
    assert broker.subscribers("a") == 0


def one_id(broker: Broker, number: int) -> str:
    epoch = broker.subscribe("any").last_event_id.partition("-")[0]
    return f"{epoch}-{number}"


async def test_a_client_that_left_before_its_first_event_resumes() -> None:
    broker = Broker()
    app = create_app({"/a": broker.channel("a")}, retry=None, opening_comment=False)
    await broker.publish("a", "before anybody came")
    async with open_stream(app, "/a") as stream:
        opening = await stream.read()
    assert re.fullmatch(rb"id: [0-9a-f]{8}-1\n\n", opening)
    await broker.publish("a", "missed")
    last = opening.decode().removeprefix("id: ").strip()
    async with open_stream(app, "/a", headers={"Last-Event-ID": last}) as stream:
        assert (await stream.receive()).data == "missed"
    async with open_stream(app, f"/a?last_event_id={last}") as stream:  # a first connection has no header
        assert (await stream.receive()).data == "missed"
    async with open_stream(app, "/a?last_event_id=x", headers={"Last-Event-ID": last}) as stream:  # which wins
        assert (await stream.receive()).data == "missed"


@pytest.mark.parametrize("reason", ["expired", "unknown", "epoch"])
async def test_a_client_that_cannot_resume_is_told(reason: str) -> None:
    broker = Broker(history=2)
    ids = [await broker.publish("a", str(number)) for number in range(5)]
    last = {"expired": ids[1], "unknown": "7", "epoch": "0-1"}[reason]
    async with open_stream(create_app({"/a": broker.channel("a")}), "/a", headers={"Last-Event-ID": last}) as stream:
        reset = await stream.receive()
        assert (reset.event, reset.data, reset.id) == ("reset", f'{{"reason":"{reason}"}}', ids[-1])
        await broker.publish("a", "later")
        assert (await stream.receive()).data == "later"


async def test_what_is_lost_twice_before_it_is_told_is_told_once_and_not_resumed_past() -> None:
    broker = Broker(history=1, max_channels=1)
    subscription = broker.subscribe("a.*", last_event_id="none-of-ours")
    assert subscription.last_event_id == "none-of-ours"  # who resumes with it is told again
    await broker.publish("a.x", "gone")
    await broker.publish("a.y", "gone too")
    await broker.publish("b", "and forgotten")
    reset = await subscription.__anext__()
    assert (reset.data, reset.id) == ('{"reason":"unknown"}', one_id(broker, 3))
    await broker.publish("a.x", "new")
    assert (await subscription.__anext__()).data == "new"
    await subscription.aclose()


async def test_what_is_too_old_is_given_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("asgi_sse.broker.dispatcher.clock", lambda: now)
    monkeypatch.setattr("asgi_sse.broker.cursor.clock", lambda: now)
    broker = Broker(max_age=60)
    first = await broker.publish("a", "old")
    await broker.publish("a", "old too")
    now = 61.0
    subscription = broker.subscribe("a", last_event_id=first)
    assert (await subscription.__anext__()).data == '{"reason":"expired"}'
    for stream in (False, True):  # nor to who reads slowly
        slow = broker.subscribe("a")
        if stream:
            slow.as_pull_source()
            slow.take(100)
        await broker.publish("a", "unread")
        if not stream:
            with anyio.move_on_after(0):
                await slow.__anext__()
        now += 61
        event = EventDecoder().feed(slow.take(100))[0] if stream else await slow.__anext__()
        assert event.event == "reset"
        await slow.aclose()
    await subscription.aclose()


async def test_several_channels_and_patterns_in_one_stream() -> None:
    broker = Broker()
    await broker.publish("orders.old", "0")
    response = EventSourceResponse(broker.subscribe("orders.*", "news", filter=lambda event: event.data != "no"))
    async with open_stream(response) as stream:
        for channel, data in [
            ("orders.1", "1"),
            ("news", "2"),
            ("orders.1.x", "3"),
            ("orders.2", "no"),
            ("orders.1", "4"),
        ]:
            await broker.publish(channel, data)
        assert [(await stream.receive()).data for _ in range(3)] == ["1", "2", "4"]
        assert broker.subscribers("orders.77") == 1


async def test_a_burst_leaves_as_one_message_and_is_encoded_once() -> None:
    broker = Broker()
    async with open_stream(EventSourceResponse(broker.subscribe("a"))) as stream:
        await stream.read()
        for number in range(100):
            broker.publish_nowait("a", number)
        assert (await stream.read()).count(b"data: ") == 100


@pytest.mark.parametrize("policy", ["reset", "close"])
async def test_a_client_that_does_not_read_costs_no_more_than_the_log(policy: Any) -> None:
    broker, registry = Broker(history=10, overflow=policy), StreamRegistry()
    response = EventSourceResponse(broker.subscribe("a"), send_timeout=None)
    async with open_stream(SSEMiddleware(response, registry=registry), capacity=1) as stream:
        for number in range(100):
            await broker.publish("a", str(number))
            await anyio.sleep(0.01)
        if policy == "reset":
            while (event := await stream.receive()).event != "reset":
                pass
            assert event.data == '{"reason":"overflow"}'
            await broker.publish("a", "later")
            assert (await stream.receive()).data == "later"
        else:
            events = [event async for event in stream]
            assert stream.complete
            assert len(events) < 10
            await stream.disconnect()
            assert registry.statistics().closed == {"overflowed": 1}


async def test_a_drain_stops_at_the_next_boundary_and_the_rest_is_resumed() -> None:
    broker, registry = Broker(), StreamRegistry()
    app = create_app({"/a": broker.channel("a")}, registry=registry)
    async with open_stream(app, "/a", capacity=1) as stream:
        for _ in range(100):
            await broker.publish("a", "x" * 5000)
        await anyio.sleep(0.1)
        registry.begin_drain()
        seen = [event async for event in stream]
        assert stream.complete
    assert len(seen) < 100
    registry = StreamRegistry()
    app = create_app({"/a": broker.channel("a")}, registry=registry)
    async with open_stream(app, "/a", headers={"Last-Event-ID": str(seen[-1].id)}) as stream:
        rest = [await stream.receive() for _ in range(100 - len(seen))]
    assert [number_of(event) for event in seen + rest] == list(range(1, 101))
    assert broker.subscribers("a") == 0


async def test_idle_subscribers_are_kept_alive_and_leave_nothing_behind() -> None:
    broker = Broker()
    subscription = broker.subscribe("a")
    reference = weakref.ref(subscription)
    async with open_stream(EventSourceResponse(subscription, ping=5)) as stream:
        await stream.read()
        assert await stream.read(timeout=6) == b": ping\n\n"
        await stream.disconnect()
    del stream, subscription
    await anyio.sleep(2)  # until its head was looked at
    gc.collect()
    assert broker.subscribers("a") == 0
    assert reference() is None


async def test_head_reads_nothing() -> None:
    broker = Broker()
    async with open_stream(create_app({"/a": broker.channel("a")}), "/a", method="HEAD") as stream:
        assert await stream.read() == b""
    assert broker.subscribers("a") == 0


# As an async iterable


async def test_a_subscription_is_an_async_iterable() -> None:
    broker = Broker()
    await broker.publish("a", "before")
    subscription = broker.subscribe("a")
    await broker.publish("a", "since it was made")
    seen: list[str | None] = []

    async def read() -> None:
        async for event in subscription:
            seen.append(event.data)  # noqa: PERF401 (a list that is read while it grows)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.sleep(0.1)
        await broker.publish("a", "live")
        await anyio.sleep(0.1)
        assert subscription.last_event_id == one_id(broker, 3)
        await subscription.aclose()
    assert seen == ["since it was made", "live"]
    assert broker.subscribers("a") == 0


async def test_replay_and_live_are_one_read() -> None:
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


async def test_a_slow_reader_whose_policy_is_to_close() -> None:
    broker = Broker(history=2, overflow="close")
    subscription = broker.subscribe("a")
    await broker.publish("a", 0)
    assert (await subscription.__anext__()).data == "0"
    for number in range(10):
        await broker.publish("a", number)
    assert [event async for event in subscription] == []


async def test_a_subscription_has_one_reader() -> None:
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


async def test_a_burst_of_publishing_does_not_overrun_who_reads() -> None:
    broker = Broker(history=20)
    async with open_stream(EventSourceResponse(broker.subscribe("a")), capacity=1000) as stream:
        await stream.read()
        for number in range(500):
            await broker.publish("a", number)
        assert [(await stream.receive()).data for _ in range(500)] == [str(number) for number in range(500)]


async def test_who_reads_what_it_publishes_lets_others_go_on() -> None:
    broker = Broker()
    async with broker.subscribe("a") as subscription:
        with anyio.move_on_after(1):
            await broker.publish("a", 0)
            async for _ in subscription:
                broker.publish_nowait("a", 0)
                if subscription.pushed > 100_000:
                    pytest.fail("nobody else had a turn")
                if subscription.pushed % 1000 == 0:
                    await anyio.sleep(0.2)


async def test_a_filter_that_raises_is_told_as_what_it_is() -> None:
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
        assert subscription.last_event_id == before  # who resumes gets it


@pytest.mark.parametrize("channels", [["a"], ["a", "b"]])
async def test_statistics_count_events(channels: list[str]) -> None:
    broker, registry = Broker(), StreamRegistry()
    async with open_stream(EventSourceResponse(broker.subscribe(*channels), registry=registry)) as stream:
        await stream.read()
        for number in range(100):
            broker.publish_nowait("a", number)
        await stream.read()
        assert registry.statistics().events == 100


async def test_wide_patterns_read_the_sequence_of_all() -> None:
    broker = Broker()
    first = await broker.publish("a.0", "x")
    for number in range(300):
        broker.publish_nowait(f"{'ab'[number % 2]}.{number}", "x" * 1000)
    async with open_stream(EventSourceResponse(broker.subscribe("a.*", last_event_id=first))) as stream:
        events = [await stream.receive() for _ in range(150)]
    assert [number_of(event) for event in events] == list(range(2, 302, 2))


async def test_a_channel_object_is_never_a_pattern() -> None:
    broker = Broker()
    async with broker.subscribe(broker.channel("a"), "b.*") as subscription:
        assert subscription.names == ("a", "b.*")
    with pytest.raises(ValueError, match=r"channel 'user\.\*'"):
        broker.channel(f"user.{'*'}")


# From other threads


@pytest.mark.real_time
async def test_publishing_from_threads() -> None:
    broker = Broker(history=10_000)

    def publish(thread: int) -> None:
        for number in range(500):
            broker.publish_nowait("a", f"{thread} {number}")

    async with open_stream(EventSourceResponse(broker.subscribe("a")), capacity=10_000) as stream:
        await stream.read(10)
        threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        events = [await stream.receive(timeout=20) for _ in range(2000)]
        for thread in threads:
            thread.join()
    assert [number_of(event) for event in events] == list(range(1, 2001))
    for number in range(4):
        of_one = [event.data for event in events if str(event.data).startswith(f"{number} ")]
        assert of_one == [f"{number} {index}" for index in range(500)]


@pytest.mark.real_time
async def test_publishing_from_another_event_loop() -> None:
    broker = Broker()

    async def publish() -> None:
        await broker.publish("a", "from elsewhere")

    async with open_stream(EventSourceResponse(broker.subscribe("a"))) as stream:
        await stream.read(10)
        await anyio.to_thread.run_sync(anyio.run, publish)
        assert (await stream.receive(10)).data == "from elsewhere"


@pytest.mark.real_time
async def test_joining_misses_nothing_of_channels_that_begin_meanwhile() -> None:
    """Of a pattern, while other threads publish to new channels."""
    broker = Broker(max_channels=100_000)
    over = threading.Event()

    def publish(thread: int) -> None:
        for number in count():
            if over.is_set():
                return
            broker.publish_nowait(f"new.{thread}.{number}", "x")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=publish, args=(number,)) for number in range(3)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(50):
            subscription, decoder = broker.subscribe("new.**"), EventDecoder()
            start = int(subscription.last_event_id.partition("-")[2])
            subscription.as_pull_source()
            numbers: list[int] = []
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
                if subscription.ready:
                    numbers += [number_of(event) for event in decoder.feed(subscription.take(65_536))]
            subscription.detach()
            assert numbers == list(range(start + 1, start + 1 + len(numbers)))
    finally:
        over.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()


def test_a_loop_that_was_closed_under_its_reader_holds_up_nobody() -> None:
    broker = Broker(max_subscribers=1)
    kept: list[Subscription] = []

    async def begin() -> None:
        subscription = broker.subscribe("a")
        subscription.as_pull_source()
        kept.append(subscription)

    anyio.run(begin)
    broker.publish_nowait("a", "x")
    anyio.run(begin)  # the first one's place is free
    assert broker.subscribers("a") == 0


# What may be published, and where


async def test_publishing_a_key_again_does_nothing() -> None:
    broker = Broker()
    first = await broker.publish("a", "x", idempotency_key="k")
    assert await broker.publish("a", "x", idempotency_key="k") == first
    assert await broker.channel("a").publish("x", idempotency_key="other") != first
    assert await broker.publish("b", "x", idempotency_key="k") != first


@pytest.mark.parametrize(
    "event", [ServerSentEvent("a", id="7"), {"data": "a", "id": 1}, b"data: a\n\n", None, object()]
)
async def test_what_is_no_event_of_a_broker(event: Any) -> None:
    with pytest.raises(InvalidEventError, match=r"leave the id out|an event must be a ServerSentEvent"):
        await Broker().publish("a", event)


async def test_a_channel_may_be_full() -> None:
    broker = Broker(max_subscribers=1)
    async with open_stream(EventSourceResponse(broker.subscribe("a"))) as stream:
        await stream.read()
        with pytest.raises(BrokerError, match="a has 1 subscribers already"):
            async with open_stream(EventSourceResponse(broker.subscribe("a"))):
                pass


def test_bad_arguments() -> None:
    broker = Broker()
    with pytest.raises(TypeError, match="needs the name of a channel"):
        broker.subscribe()
    with pytest.raises(ValueError, match="channel"):
        broker.channel("a*")
    with pytest.raises(ValueError, match="pattern"):
        broker.subscribe("a*")
    with pytest.raises(TypeError, match="filter=3 is not callable"):
        broker.subscribe("a", filter=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="last_event_id=5 is int"):
        broker.subscribe("a", last_event_id=5)  # type: ignore[arg-type]
    for name in ("max_age", "max_subscribers", "max_runs", "run_grace"):
        with pytest.raises(TypeError, match=rf"{name} must be a number( or None)?, got '1'"):
            Broker(**{name: "1"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Channel\('a'\) is not iterable; give its subscribe"):
        EventSourceResponse(broker.channel("a"))  # type: ignore[arg-type]
    for arguments in ({"url": "ftp://"}, {"overflow": "drop"}, {"max_subscribers": 0}, {"history": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Broker(**arguments)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("x.*", "; '*' is for patterns"),
        ("x y", "; ' ' is not among them"),
        ("x\udc00", r"; '\udc00' is not among them"),
        ("a..b", ""),
    ],
)
async def test_the_character_that_no_name_has_is_named(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"channel {name!r}: give up to 200 of A-Z a-z 0-9 _ ")) as raised:
        await Broker().publish(name, "x")
    assert str(raised.value).endswith(f" , - in segments between dots{told}")


@pytest.mark.parametrize("names", [["a", "b"], ("a", "b"), {"a"}])
def test_several_names_are_given_each_by_itself(names: Any) -> None:
    told = f"channel {names!r} is {type(names).__name__}; give each by itself: 'a', 'b'"
    for read in (Broker().subscribe, Broker().endpoint):
        with pytest.raises(TypeError, match=re.escape(told)):
            read(names)


async def test_names() -> None:
    async with Broker() as broker:
        assert repr(broker.channel("a")) == "Channel('a')"
        assert repr(broker.subscribe("a", "b.*")).startswith("<Subscription a b.* at ")
