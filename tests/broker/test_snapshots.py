"""Snapshots: the state that a subscriber gets before the events that change it."""

import random
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from broker_clients import id_of, status_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi_sse import (
    Broker,
    EventDecoder,
    EventSourceResponse,
    HTTPError,
    InvalidEventError,
    Request,
    ServerSentEvent,
    StreamRegistry,
    create_app,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


class Counter:
    """A state that changes with published events, and can be read as a whole."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.value = 0
        self.made = 0
        self.wait: anyio.Event | None = None

    async def add(self) -> None:
        self.value += 1
        await self.broker.publish("counter", {"event": "added", "data": self.value})

    async def snapshot(self, request: Request | None = None) -> list[dict[str, Any]]:
        self.made += 1
        if self.wait is not None:
            await self.wait.wait()
        return [{"event": "part", "data": "one of two"}, {"event": "all", "data": self.value}]


async def test_snapshot_comes_first_and_its_last_event_has_the_id() -> None:
    broker = Broker()
    counter = Counter(broker)
    await counter.add()
    app = create_app({"/c": broker.endpoint("counter", snapshot=counter.snapshot)}, opening_comment=False, retry=None)
    async with open_stream(app, "/c") as stream:
        opening = (await stream.read()).decode()
        event_id = opening.partition("id: ")[2].partition("\n")[0]
        assert event_id.endswith("-1")
        # A client that disconnects before the last event has no id, and gets the whole snapshot again.
        assert opening == f"event: part\ndata: one of two\n\nid: {event_id}\nevent: all\ndata: 1\n\n"
        await counter.add()
        assert (await stream.receive()).data == "2"
    async with open_stream(app, "/c", headers={"Last-Event-ID": event_id}) as stream:
        assert (await stream.receive()).event == "added"  # a client that resumes gets no snapshot
    assert counter.made == 1


async def test_snapshot_can_be_made_before_the_first_read() -> None:
    broker = Broker()
    counter = Counter(broker)
    await counter.add()
    subscription = broker.subscribe("counter", snapshot=counter.snapshot)
    await subscription.prepare()
    await subscription.prepare()
    assert counter.made == 1
    await counter.add()
    assert [(event.event, event.data) for event in [await anext(subscription) for _ in range(3)]] == [
        ("part", "one of two"),
        ("all", "1"),
        ("added", "2"),
    ]
    assert counter.made == 1
    await subscription.aclose()


async def test_large_snapshot_is_sent_in_parts_without_an_id_until_the_last() -> None:
    broker = Broker()
    await broker.publish("a", "x")
    subscription = broker.subscribe("a", snapshot=lambda: ["1" * 100, "2" * 100, "3" * 100])
    await subscription.prepare()
    source, decoder = subscription.as_pull_source(), EventDecoder()
    ids: list[str] = []
    for digit in "123":
        assert source.ready
        assert [event.data for event in decoder.feed(source.take(150))] == [digit * 100]
        ids.append(decoder.last_event_id)
    assert ids == ["", "", id_of(broker, 1)]
    assert source.take(150) == b""
    source.detach()


async def test_events_published_while_a_snapshot_is_made_follow_it() -> None:
    broker = Broker()
    counter = Counter(broker)
    counter.wait = anyio.Event()
    response = EventSourceResponse(broker.subscribe("counter", snapshot=counter.snapshot))
    async with open_stream(response) as stream:
        await anyio.sleep(1)
        await counter.add()
        await counter.add()
        await anyio.sleep(1)
        counter.wait.set()
        seen = [await stream.receive() for _ in range(4)]
    # The snapshot has the changes already. An event may repeat a change, but none is missed.
    assert [(event.event, event.data) for event in seen] == [
        ("part", "one of two"),
        ("all", "2"),
        ("added", "1"),
        ("added", "2"),
    ]
    assert str(seen[1].id).endswith("-0")


@pytest.mark.parametrize("reads", ["stream", "iterable"])
async def test_snapshot_follows_each_reset(reads: str) -> None:
    broker = Broker(history=2)
    counter = Counter(broker)
    subscription = broker.subscribe("counter", snapshot=counter.snapshot, last_event_id="gone-1")
    for _ in range(5):
        await counter.add()

    async def check(receive: Any) -> None:
        reset = await receive()
        assert (reset.event, reset.data, reset.id) == ("reset", '{"reason":"epoch"}', "")
        assert [(await receive()).event for _ in range(2)] == ["part", "all"]
        await counter.add()
        assert (await receive()).data == "6"
        for _ in range(5):
            await counter.add()
        if reads == "stream":  # a stream has taken some or all of the five already
            return
        reset = await receive()
        assert (reset.event, reset.data, reset.id) == ("reset", '{"reason":"overflow"}', "")
        assert subscription.last_event_id == ""
        assert (await receive()).event == "part"
        state = await receive()
        assert (state.event, state.data) == ("all", "11")
        assert subscription.last_event_id == state.id

    if reads == "stream":
        # The snapshot is made when the stream begins, after the five events, which are therefore in it.
        async with open_stream(EventSourceResponse(subscription)) as stream:
            await check(stream.receive)
    else:
        async with subscription:
            await check(subscription.__anext__)
    assert counter.made == 2 - (reads == "stream")


async def test_slow_stream_gets_a_snapshot_instead_of_missed_events() -> None:
    broker = Broker(history=2)
    counter = Counter(broker)
    app = create_app({"/c": broker.endpoint("counter", snapshot=counter.snapshot)}, send_timeout=None)
    async with open_stream(app, "/c", capacity=1) as stream:
        for _ in range(50):
            await counter.add()
            await anyio.sleep(0.01)
        seen: list[ServerSentEvent] = []
        while not seen or seen[-1].event != "reset":
            seen.append(await stream.receive())
        assert seen[-1].id == ""
        assert [(await stream.receive()).event for _ in range(2)] == ["part", "all"]
        assert stream.last_event_id
        await counter.add()
        assert (await stream.receive()).data == "51"


@pytest.mark.parametrize("kind", ["one", "none", "empty", "sync", "generator", "async generator", "iterator"])
async def test_snapshot_may_be_anything_that_gives_events(kind: str) -> None:
    class Iterates:
        def __init__(self) -> None:
            self.left = 2

        def __aiter__(self) -> "Iterates":
            return self

        async def __anext__(self) -> str:
            self.left -= 1
            if self.left < 0:
                raise StopAsyncIteration
            return "x"

    def make() -> Any:
        async def generate() -> AsyncIterator[str]:
            yield "x"
            await anyio.lowlevel.checkpoint()
            yield "x"

        return {
            "one": ServerSentEvent("x"),
            "none": None,
            "empty": [],
            "sync": ["x", "x"],
            "generator": (text for text in "xx"),
            "async generator": generate(),
            "iterator": Iterates(),
        }[kind]

    broker = Broker()
    await broker.publish("a", "before")
    async with open_stream(EventSourceResponse(broker.subscribe("a", snapshot=make))) as stream:
        for _ in range({"one": 1, "none": 0, "empty": 0}.get(kind, 2)):
            assert (await stream.receive()).data == "x"
        await broker.publish("a", "later")
        assert (await stream.receive()).data == "later"


@pytest.mark.parametrize(
    ("made", "error"), [([{"data": 1, "id": 7}], InvalidEventError), (object(), TypeError), ([b"x"], InvalidEventError)]
)
async def test_invalid_snapshots_raise(made: Any, error: type[Exception]) -> None:
    broker = Broker()
    with pytest.raises(error):
        async with open_stream(EventSourceResponse(broker.subscribe("a", snapshot=lambda: made))) as stream:
            await stream.receive()
    assert broker.subscribers("a") == 0


async def test_failing_snapshot_sets_the_status_or_cuts_the_stream() -> None:
    broker = Broker(history=2)
    fails: list[Exception] = [HTTPError(503, "the database is down")]

    async def snapshot(request: Request) -> str:
        await anyio.sleep(0.5)  # less than `open_timeout`
        if fails:
            raise fails.pop()
        return "state"

    app = create_app({"/a": broker.endpoint("a", snapshot=snapshot)}, send_timeout=None)
    assert await status_of(app, "/a") == (503, "the database is down")
    with pytest.raises(ZeroDivisionError):
        async with open_stream(app, "/a", capacity=1) as stream:
            fails.append(ZeroDivisionError())
            for _ in range(50):
                await broker.publish("a", "x")
                await anyio.sleep(0.01)
            async for _ in stream:
                pass
    assert broker.subscribers("a") == 0


async def test_disconnect_cancels_the_snapshot() -> None:
    broker = Broker()
    ended: list[str] = []

    async def snapshot() -> None:
        try:
            await anyio.sleep(3600)
        except anyio.get_cancelled_exc_class():
            ended.append("cancelled")
            raise

    async with open_stream(EventSourceResponse(broker.subscribe("a", snapshot=snapshot))) as stream:
        await anyio.sleep(1)
        await stream.disconnect()
    assert ended == ["cancelled"]
    assert broker.subscribers("a") == 0


async def test_stream_reacts_while_its_first_snapshot_is_made() -> None:
    broker, registry = Broker(), StreamRegistry()
    cancelled: list[bool] = []

    async def snapshot(request: Request) -> None:
        try:
            await anyio.sleep(1000)
        except anyio.get_cancelled_exc_class():
            cancelled.append(True)
            raise

    app = create_app({"/a": broker.endpoint("a", snapshot=snapshot)}, registry=registry, ping=5)
    async with open_stream(app, "/a") as stream:
        await stream.read()
        assert await stream.read(timeout=6) == b": ping\n\n"
        await stream.disconnect()
    async with open_stream(app, "/a") as stream:
        report = await registry.drain()
        assert [event async for event in stream] == []
        assert stream.complete
    assert report.closed == 1
    assert cancelled == [True, True]
    async with open_stream(app, "/a", method="HEAD") as stream:
        assert await stream.read() == b""


@pytest.mark.parametrize("how", ["expired", "overflow"])
async def test_one_snapshot_at_a_time_is_made_after_its_position_is_taken(how: str) -> None:
    """Events are lost before the first read and, with ``overflow``, again while the snapshot is made."""
    broker = Broker(history=2)
    state, made = 0, 0

    async def change(number: int = 1) -> None:
        nonlocal state
        for _ in range(number):
            state += 1
            await broker.publish("a", {"event": "change", "data": state})

    async def snapshot() -> dict[str, Any]:
        nonlocal made
        made += 1
        seen = state
        await anyio.sleep(1)
        return {"event": "state", "data": seen}

    await change(5)
    last = broker.subscribe("a").last_event_id.replace("-5", "-1")
    response = EventSourceResponse(
        broker.subscribe("a", last_event_id=last if how == "expired" else None, snapshot=snapshot), send_timeout=None
    )

    async def later() -> None:
        await anyio.sleep(0.5)
        await change(1 if how == "expired" else 5)  # five changes are more than the log keeps
        await anyio.sleep(4)
        await change()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(later)
        async with open_stream(response) as stream:
            seen = 0
            while seen < (7 if how == "expired" else 11):
                event = await stream.receive(5)
                if event.event == "state":
                    seen = int(str(event.data))
                    assert str(event.id).endswith(f"-{seen}")
                elif event.event == "change":
                    seen += 1
                    assert str(event.data) == str(seen)
    assert made == (1 if how == "expired" else 2)


async def test_subscriber_is_closed_if_every_snapshot_is_outdated() -> None:
    broker, registry = Broker(history=2), StreamRegistry()

    async def snapshot() -> str:
        await anyio.sleep(1)
        return "state"

    async def publish() -> None:
        while True:
            await broker.publish("a", "x")
            await anyio.sleep(0.1)

    response = EventSourceResponse(broker.subscribe("a", snapshot=snapshot), registry=registry)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        async with open_stream(response) as stream:
            events = [event.event async for event in stream]
        tasks.cancel_scope.cancel()
    assert events.count("reset") == 4
    assert registry.statistics().closed == {"overflowed": 1}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
async def test_state_rebuilt_from_snapshots_and_events_is_correct(seed: int) -> None:
    """Clients keep a state by snapshots and changes, are cut anywhere, and are too slow at times."""
    chance = random.Random(seed)
    broker = Broker(history=chance.choice([1, 3, 50]), max_channels=chance.choice([1, 50]))
    state: set[int] = set()

    async def snapshot() -> list[dict[str, Any]]:
        made = [{"event": "part", "data": number} for number in sorted(state)]
        await anyio.sleep(chance.choice([0, 0, 0.1, 0.3]))
        return [{"event": "clear", "data": ""}, *made]

    done = anyio.Event()

    async def client() -> None:
        seen: set[int] = set()
        last = ""
        while True:
            ending = done.is_set()
            response = EventSourceResponse(
                broker.subscribe("set.*", last_event_id=last or None, snapshot=snapshot), send_timeout=None
            )
            async with open_stream(response, capacity=1) as stream:
                events: list[ServerSentEvent] = []
                with anyio.move_on_after(5 if ending else 0.2):
                    for _ in range(10**6 if ending else chance.randrange(20)):
                        events.append(await stream.receive(10))  # noqa: PERF401 (the loop may be cancelled)
                events += stream._events  # the decoder has committed their ids, so they count as seen
                if any(event.event == "reset" for event in events) or stream._decoder.last_event_id:
                    last = stream.last_event_id
            for event in events:
                if event.event in {"clear", "reset"}:
                    seen.clear()
                else:
                    seen.add(int(str(event.data)))
            if ending:
                break
        assert seen == state

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(client)
        for number in range(60):
            state.add(number)
            await broker.publish(f"set.{number % 3}", number)
            if chance.random() < 0.3:
                await anyio.sleep(chance.choice([0, 0.01]))
        done.set()
