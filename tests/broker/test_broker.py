"""`Broker`: publishing, channels as streams, limits and arguments."""

import gc
import re
import sys
import threading
import weakref
from itertools import count
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from broker_clients import id_of, offset_of

from asgi_sse import (
    Broker,
    BrokerError,
    EventDecoder,
    EventSourceResponse,
    InvalidEventError,
    ServerSentEvent,
    SSEMiddleware,
    StreamRegistry,
    Subscription,
    create_app,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


# Streams


async def test_events_reach_every_client_with_their_ids() -> None:
    broker = Broker()
    app = create_app({"/a": broker.channel("a")})
    async with open_stream(app, "/a") as one, open_stream(app, "/a") as other:
        assert await broker.channel("a").publish({"data": "first", "event": "kind"}) == id_of(broker, 1)
        await broker.publish("b", "of another channel")
        await broker.publish("a", "second")
        for stream in (one, other):
            first, second = await stream.receive(), await stream.receive()
            assert (first.data, first.event, first.id) == ("first", "kind", id_of(broker, 1))
            assert (second.data, second.id) == ("second", id_of(broker, 3))
        assert broker.subscribers("a") == 2
        assert broker.channel("a").subscribers == 2
    assert broker.subscribers("a") == 0


async def test_client_that_left_before_its_first_event_can_resume() -> None:
    broker = Broker()
    app = create_app({"/a": broker.channel("a")}, retry=None, opening_comment=False)
    await broker.publish("a", "before the client")
    async with open_stream(app, "/a") as stream:
        opening = await stream.read()
    assert re.fullmatch(rb"id: [0-9a-f]{8}-1\n\n", opening)
    await broker.publish("a", "missed")
    last = opening.decode().removeprefix("id: ").strip()
    async with open_stream(app, "/a", headers={"Last-Event-ID": last}) as stream:
        assert (await stream.receive()).data == "missed"
    async with open_stream(app, f"/a?last_event_id={last}") as stream:  # a browser's first connection has no header
        assert (await stream.receive()).data == "missed"
    async with open_stream(app, "/a?last_event_id=x", headers={"Last-Event-ID": last}) as stream:  # the header wins
        assert (await stream.receive()).data == "missed"


@pytest.mark.parametrize("reason", ["expired", "unknown", "epoch"])
async def test_client_that_cannot_resume_gets_a_reset(reason: str) -> None:
    broker = Broker(history=2)
    ids = [await broker.publish("a", str(number)) for number in range(5)]
    last = {"expired": ids[1], "unknown": "7", "epoch": "0-1"}[reason]
    async with open_stream(create_app({"/a": broker.channel("a")}), "/a", headers={"Last-Event-ID": last}) as stream:
        reset = await stream.receive()
        assert (reset.event, reset.data, reset.id) == ("reset", f'{{"reason":"{reason}"}}', ids[-1])
        await broker.publish("a", "later")
        assert (await stream.receive()).data == "later"


async def test_two_losses_give_one_reset() -> None:
    broker = Broker(history=1, max_channels=1)
    subscription = broker.subscribe("a.*", last_event_id="unknown-id")
    assert subscription.last_event_id == "unknown-id"  # a client that resumes with it is reset again
    await broker.publish("a.x", "gone")
    await broker.publish("a.y", "gone as well")
    await broker.publish("b", "and its channel forgotten")
    reset = await subscription.__anext__()
    assert (reset.data, reset.id) == ('{"reason":"unknown"}', id_of(broker, 3))
    await broker.publish("a.x", "new")
    assert (await subscription.__anext__()).data == "new"
    await subscription.aclose()


async def test_expired_events_are_not_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("asgi_sse.broker.dispatcher.clock", lambda: now)
    monkeypatch.setattr("asgi_sse.broker.cursor.clock", lambda: now)
    broker = Broker(max_age=60)
    first = await broker.publish("a", "old")
    await broker.publish("a", "old as well")
    now = 61.0
    subscription = broker.subscribe("a", last_event_id=first)
    assert (await subscription.__anext__()).data == '{"reason":"expired"}'
    for stream in (False, True):  # slow subscribers do not get them either
        slow = broker.subscribe("a")
        source = slow.as_pull_source() if stream else None
        if source is not None:
            source.take(100)
        await broker.publish("a", "unread")
        if source is None:
            with anyio.move_on_after(0):
                await slow.__anext__()
        now += 61
        event = EventDecoder().feed(source.take(100))[0] if source is not None else await slow.__anext__()
        assert event.event == "reset"
        await slow.aclose()
    await subscription.aclose()


async def test_stream_carries_several_channels_and_patterns() -> None:
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


async def test_burst_is_sent_as_one_message() -> None:
    broker = Broker()
    async with open_stream(EventSourceResponse(broker.subscribe("a"))) as stream:
        await stream.read()
        for number in range(100):
            broker.publish_nowait("a", number)
        assert (await stream.read()).count(b"data: ") == 100


async def test_publish_waits_for_subscribers_after_a_burst() -> None:
    broker = Broker(history=20)
    async with open_stream(EventSourceResponse(broker.subscribe("a")), capacity=1000) as stream:
        await stream.read()
        for number in range(500):
            await broker.publish("a", number)
        assert [(await stream.receive()).data for _ in range(500)] == [str(number) for number in range(500)]


@pytest.mark.parametrize("policy", ["reset", "close"])
async def test_slow_client_is_reset_or_closed(policy: Any) -> None:
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


async def test_drain_stops_between_events_and_the_client_resumes() -> None:
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
    assert [offset_of(event) for event in seen + rest] == list(range(1, 101))
    assert broker.subscribers("a") == 0


async def test_idle_subscriber_gets_keep_alives_and_is_collected() -> None:
    broker = Broker()
    subscription = broker.subscribe("a")
    reference = weakref.ref(subscription)
    async with open_stream(EventSourceResponse(subscription, ping=5)) as stream:
        await stream.read()
        assert await stream.read(timeout=6) == b": ping\n\n"
        await stream.disconnect()
    del stream, subscription
    await anyio.sleep(2)  # until the check of the response headers is over
    gc.collect()
    assert broker.subscribers("a") == 0
    assert reference() is None


async def test_head_request_has_no_body_and_no_subscriber() -> None:
    broker = Broker()
    async with open_stream(create_app({"/a": broker.channel("a")}), "/a", method="HEAD") as stream:
        assert await stream.read() == b""
    assert broker.subscribers("a") == 0


@pytest.mark.parametrize("channels", [["a"], ["a", "b"]])
async def test_statistics_count_events(channels: list[str]) -> None:
    broker, registry = Broker(), StreamRegistry()
    async with open_stream(EventSourceResponse(broker.subscribe(*channels), registry=registry)) as stream:
        await stream.read()
        for number in range(100):
            broker.publish_nowait("a", number)
        await stream.read()
        assert registry.statistics().events == 100


# Threads and event loops


@pytest.mark.real_time
async def test_threads_can_publish() -> None:
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
    assert [offset_of(event) for event in events] == list(range(1, 2001))
    for number in range(4):
        of_one = [event.data for event in events if str(event.data).startswith(f"{number} ")]
        assert of_one == [f"{number} {index}" for index in range(500)]


@pytest.mark.real_time
async def test_another_event_loop_can_publish() -> None:
    broker = Broker()

    async def publish() -> None:
        await broker.publish("a", "from another loop")

    async with open_stream(EventSourceResponse(broker.subscribe("a"))) as stream:
        await stream.read(10)
        await anyio.to_thread.run_sync(anyio.run, publish)
        assert (await stream.receive(10)).data == "from another loop"


@pytest.mark.real_time
async def test_new_subscriber_misses_no_new_channel() -> None:
    """A subscriber of a pattern joins while other threads publish to new channels."""
    broker = Broker(max_channels=100_000)
    stop = threading.Event()

    def publish(thread: int) -> None:
        for number in count():
            if stop.is_set():
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
            source = subscription.as_pull_source()
            offsets: list[int] = []
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
                if source.ready:
                    offsets += [offset_of(event) for event in decoder.feed(source.take(65_536))]
            source.detach()
            assert offsets == list(range(start + 1, start + 1 + len(offsets)))
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()


def test_subscriber_of_a_closed_event_loop_is_removed() -> None:
    broker = Broker(max_subscribers=1)
    kept: list[Subscription] = []

    async def begin() -> None:
        subscription = broker.subscribe("a")
        subscription.as_pull_source()
        kept.append(subscription)

    anyio.run(begin)
    broker.publish_nowait("a", "x")
    anyio.run(begin)  # the first subscriber does not count any more
    assert broker.subscribers("a") == 0


# Arguments


async def test_publishing_an_idempotency_key_again_adds_no_event() -> None:
    broker = Broker()
    first = await broker.publish("a", "x", idempotency_key="k")
    assert await broker.publish("a", "x", idempotency_key="k") == first
    assert await broker.channel("a").publish("x", idempotency_key="other") != first
    assert await broker.publish("b", "x", idempotency_key="k") != first
    assert broker.channel("a").publish_nowait("x", idempotency_key="k") == first


async def test_idempotency_key_is_forgotten_after_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("asgi_sse.broker.backends.memory.clock", lambda: now)
    broker = Broker()
    first = await broker.publish("a", "x", idempotency_key="k")
    now = 60.0
    other = await broker.publish("a", "x", idempotency_key="other")
    now = 119.0
    assert await broker.publish("a", "x", idempotency_key="k") == first
    now = 120.0
    assert await broker.publish("a", "x", idempotency_key="k") == id_of(broker, 3)
    assert await broker.publish("a", "x", idempotency_key="other") == other


async def test_too_many_idempotency_keys_are_refused_until_some_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("asgi_sse.broker.backends.memory.clock", lambda: now)
    monkeypatch.setattr("asgi_sse.broker.backends.memory._MAX_IDEMPOTENCY_KEYS", 2)
    broker = Broker()
    first = await broker.publish("a", "x", idempotency_key="1")
    now = 1.0
    await broker.publish("a", "x", idempotency_key="2")
    with pytest.raises(BrokerError, match=r"at most 2 idempotency keys within 120 s; publish without a key, or more"):
        await broker.publish("a", "x", idempotency_key="3")
    assert await broker.publish("a", "x", idempotency_key="1") == first
    assert await broker.publish("a", "x") == id_of(broker, 3)
    now = 120.0
    assert await broker.publish("a", "x", idempotency_key="3") == id_of(broker, 4)


@pytest.mark.parametrize(
    "event", [ServerSentEvent("a", id="7"), {"data": "a", "id": 1}, b"data: a\n\n", None, object()]
)
async def test_invalid_events_are_refused(event: Any) -> None:
    with pytest.raises(InvalidEventError, match=r"leave the id out|an event must be a ServerSentEvent"):
        await Broker().publish("a", event)


async def test_full_channel_raises() -> None:
    broker = Broker(max_subscribers=1)
    async with open_stream(EventSourceResponse(broker.subscribe("a"))) as stream:
        await stream.read()
        with pytest.raises(BrokerError, match=r"channel a is full \(max_subscribers=1\)"):
            async with open_stream(EventSourceResponse(broker.subscribe("a"))):
                pass


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis", "got 'redis'"),
        ("redis:/user:secret@host", "got '...'"),
        ("user:secret@host:6379", "got '...'"),
        ("host:6379?password=secret", "got '...'"),
        ("user:secret@host://", "got '...://'"),
        ("ftp://user:secret@host", "got 'ftp://...'"),
        (b"redis://user:secret@host", "got bytes"),
    ],
)
def test_error_for_an_invalid_url_does_not_show_its_password(url: Any, shown: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(shown)) as caught:
        Broker(url)
    assert "secret" not in str(caught.value)


def test_invalid_arguments_are_refused() -> None:
    broker = Broker()
    with pytest.raises(TypeError, match="channels must be at least one name, got none"):
        broker.subscribe()
    with pytest.raises(ValueError, match="channel"):
        broker.channel("a*")
    with pytest.raises(ValueError, match="pattern"):
        broker.subscribe("a*")
    with pytest.raises(TypeError, match="filter must be a function or None, got 3"):
        broker.subscribe("a", filter=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"last_event_id must be a str or None, got 5 \(int\)"):
        broker.subscribe("a", last_event_id=5)  # type: ignore[arg-type]
    for name in ("max_age", "max_subscribers", "max_runs", "run_grace"):
        with pytest.raises(TypeError, match=rf"{name} must be a number( or None)?, got '1'"):
            Broker(**{name: "1"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"content must be iterable, got .*Channel\('a'\); pass its subscribe"):
        EventSourceResponse(broker.channel("a"))  # type: ignore[arg-type]
    for arguments in ({"url": "ftp://"}, {"overflow": "drop"}, {"max_subscribers": 0}, {"history": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Broker(**arguments)


@pytest.mark.parametrize("url", [None, 6379, b"redis://localhost"])
def test_url_must_be_a_str(url: Any) -> None:
    with pytest.raises(TypeError, match=r"url must be a str, got .*; pass one like 'redis://localhost:6379/0'"):
        Broker(url)


@pytest.mark.parametrize("client", ["redis", "nats"])
def test_missing_client_of_a_server_is_named_with_its_extra(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = ("asgi_sse.broker.backends.redis", "asgi_sse.broker.backends.nats", "asgi_sse.broker.backends.jetstream")
    for name in list(sys.modules):
        if name.partition(".")[0] == client or name.startswith(backends):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, client, None)
    with pytest.raises(ModuleNotFoundError) as missing:
        Broker(f"{client}://localhost")
    assert str(missing.value) == f'the client of {client} is not installed: pip install "asgi-sse[{client}]"'


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("x.*", "; only patterns may have '*'"),
        ("x y", "; remove ' '"),
        ("x\udc00", r"; remove '\udc00'"),
        ("a..b", ""),
    ],
)
async def test_error_names_the_forbidden_character(name: str, cure: str) -> None:
    with pytest.raises(ValueError, match=re.escape("channel must be 1 to 200 of A-Z a-z 0-9 _ ")) as raised:
        await Broker().publish(name, "x")
    assert str(raised.value).endswith(f" , - in segments between dots, got {name!r}{cure}")


@pytest.mark.parametrize("names", [["a", "b"], ("a", "b"), {"a"}])
def test_list_of_names_is_refused(names: Any) -> None:
    error = (
        f"channel must be one name, got {names!r} ({type(names).__name__}); pass several names as arguments: 'a', 'b'"
    )
    for method in (Broker().subscribe, Broker().endpoint):
        with pytest.raises(TypeError, match=re.escape(error)):
            method(names)


async def test_reprs_have_the_names() -> None:
    async with Broker() as broker:
        assert repr(broker.channel("a")) == "Channel('a')"
        assert repr(broker.subscribe("a", "b.*")).startswith("<Subscription a b.* at ")
