"""The contract of `asgi_sse.broker.backends.base.Backend`, checked on memory and on each real server.

Most tests open two brokers on one server, like two processes. In memory, both are the same broker.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import count
from typing import Any

import pytest
from backend_helpers import data, take
from backend_servers import SERVERS, TIMEOUT_S, BackendServer, Nats

import asgi_sse.broker
from asgi_sse import Broker, BrokerError, EventSourceResponse, InvalidEventError, Run, ServerSentEvent, Subscription
from asgi_sse.testing import open_stream

pytestmark = [pytest.mark.anyio, pytest.mark.real_time]

_prefixes = (f"t{number}" for number in count())


@pytest.fixture(scope="module", params=[None, *SERVERS], ids=lambda kind: kind.name if kind else "memory")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer | None]:
    """Each server, or ``None`` for memory."""
    if request.param is None:
        yield None
        return
    if not request.param.available():
        pytest.skip(f"{request.param.name} is not installed")
    with request.param(tmp_path_factory.mktemp("server"), sync=False) as server:
        yield server


@pytest.fixture
def limits_per_channel(server: BackendServer | None) -> None:
    """Skip a server that has no limits for each channel."""
    if isinstance(server, Nats):
        pytest.skip("the limits of a stream bound all channels together")


class Brokers:
    """Opens brokers on one server, with the same prefix."""

    def __init__(self, server: BackendServer | None, stack: AsyncExitStack) -> None:
        self.server = server
        self.prefix = next(_prefixes)
        self._stack = stack
        self._only: Broker | None = None

    async def open(self, **options: Any) -> Broker:
        if self.server is None:
            if self._only is None:
                self._only = await self._stack.enter_async_context(Broker(**options))
            return self._only
        return await self._stack.enter_async_context(Broker(self.server.url, prefix=self.prefix, **options))

    async def pair(self, **options: Any) -> tuple[Broker, Broker]:
        return await self.open(**options), await self.open(**options)


@pytest.fixture
async def brokers(server: BackendServer | None) -> AsyncIterator[Brokers]:
    async with AsyncExitStack() as stack:
        yield Brokers(server, stack)


async def take_until(subscription: Subscription, data: str) -> list[ServerSentEvent]:
    """Return all events up to the one with this data."""
    events: list[ServerSentEvent] = []
    async with asyncio.timeout(TIMEOUT_S):
        async for event in subscription:
            events.append(event)
            if event.data == data:
                break
    return events


async def wait_for(broker: Broker, *ids: str) -> None:
    """Wait until `broker` has received the events with these ids."""
    async with asyncio.timeout(TIMEOUT_S):
        while offset_of(broker.statistics().last_event_id) < max(map(offset_of, ids)):
            await asyncio.sleep(0.001)


def offset_of(event_id: str | None) -> int:
    return int((event_id or "").partition("-")[2])


def type_and_reason(event: ServerSentEvent) -> tuple[str | None, str]:
    return event.event, json.loads(event.data or "{}").get("reason")


# Order


async def test_all_subscribers_see_the_same_events_in_one_order(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    names = [("a",), ("a", "b.x"), ("b.*",), ("**",)]
    subscriptions = {(broker, name): broker.subscribe(*name) for broker in (one, two) for name in names}
    readers = {
        key: asyncio.ensure_future(
            take_until(subscription, "last") if key[1] == ("**",) else take(subscription, EACH[key[1]])
        )
        for key, subscription in subscriptions.items()
    }
    await asyncio.sleep(0)

    async def publish(broker: Broker, publisher: str) -> list[str]:
        return [await broker.publish(["a", "b.x", "b.y"][number % 3], f"{publisher} {number}") for number in range(30)]

    ids = await asyncio.gather(
        *(publish(broker, f"{index}{task}") for index, broker in enumerate((one, two)) for task in "xy")
    )
    last = await one.publish("c", "last")
    seen = {key: await reader for key, reader in readers.items()}
    for name in names:
        assert seen[one, name] == seen[two, name]
    everything = seen[one, ("**",)]
    assert len(everything) == 121
    assert everything[-1].id == last
    assert sorted(offset_of(event.id) for event in everything) == [offset_of(event.id) for event in everything]
    for own in ids:  # the events of one task keep their order
        assert own == sorted(own, key=offset_of)
        assert set(own) <= {event.id for event in everything}
    assert len({event.id for event in everything}) == 121


EACH = {("a",): 40, ("a", "b.x"): 80, ("b.*",): 80}


async def test_event_arrives_unchanged(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    subscription = two.subscribe("a")
    events = [
        ServerSentEvent("plain"),
        ServerSentEvent({"key": ["value", 1, None]}, event="typed"),
        ServerSentEvent("two\nlines\n", event="ä", retry=1500, comment="a comment\nof two lines"),
        ServerSentEvent(""),
        ServerSentEvent(None, retry=20),
        ServerSentEvent(None, comment="nothing else"),
        ServerSentEvent("\0 \u2028 \U0001f600 \ufeff"),
        ServerSentEvent("x" * 200_000),
    ]
    ids = [await one.publish("a", event) for event in events]
    seen = await take(subscription, len(events))
    assert [(event.data, event.event, event.retry, event.comment) for event in seen] == [
        (event.data, event.event, event.retry, event.comment) for event in events
    ]
    assert [event.id for event in seen] == ids


@pytest.mark.parametrize("name", ["x", "a.b.c", "AZaz09_~:/@+=,-", "n" * 200])
async def test_all_valid_channel_names_work(brokers: Brokers, name: str) -> None:
    one, two = await brokers.pair()
    subscription, other = two.subscribe(name), two.subscribe(name.lower() + "x" if len(name) < 200 else "other")
    await one.publish(name, "hello")
    assert data(await take(subscription, 1)) == ["hello"]
    await one.publish(other.names[0], "not for the first one")
    assert data(await take(other, 1)) == ["not for the first one"]
    cold = await brokers.open()
    assert data(await take(cold.subscribe(name, last_event_id=f"{epoch(one)}-0"), 1)) == ["hello"]


def epoch(broker: Broker) -> str:
    return broker.statistics().last_event_id.partition("-")[0]


async def test_invalid_publications_are_refused(brokers: Brokers) -> None:
    one, _ = await brokers.pair()
    with pytest.raises(InvalidEventError, match="an event to publish must have no id, got id="):
        await one.publish("a", ServerSentEvent("x", id="1"))
    with pytest.raises(InvalidEventError, match="an event must be a ServerSentEvent"):
        await one.publish("a", object())
    for name in ("", "a b", "a.*", "!control", "ä", "a..b"):
        with pytest.raises(ValueError, match="channel"):
            await one.publish(name, "x")
    for key in ("", "x" * 201, 7):
        with pytest.raises(ValueError, match="idempotency_key"):
            await one.publish("a", "x", idempotency_key=key)  # type: ignore[arg-type]


# Idempotency keys


async def test_repeated_key_publishes_once_per_channel(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    subscription = two.subscribe("**")
    first = await one.publish("a", "first", idempotency_key="k:1")
    again = await asyncio.gather(
        *(broker.publish("a", "again", idempotency_key="k:1") for broker in (one, two, one, two))
    )
    assert again == [first] * 4
    assert await two.publish("b", "another channel", idempotency_key="k:1") != first
    assert await two.publish("a", "another key", idempotency_key="k:2") != first
    assert data(await take(subscription, 3)) == ["first", "another channel", "another key"]


# Resume


async def test_resume_after_any_id_on_any_broker_delivers_all_later_events(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    ids = [await (one, two)[number % 2].publish("ab"[number % 3 == 0], str(number)) for number in range(12)]
    cold = await brokers.open()  # it has received none of the events live
    for broker in (one, two, cold):
        for number, event_id in enumerate(ids):
            for names, wanted in ((("a", "b"), "ab"), (("*",), "ab"), (("b",), "b"), (("**", "a"), "ab")):
                rest = [str(later) for later in range(number + 1, 12) if "ab"[later % 3 == 0] in wanted]
                async with broker.subscribe(*names, last_event_id=event_id) as subscription:
                    assert data(await take(subscription, len(rest))) == rest
        await wait_for(broker, *ids)
        async with broker.subscribe("a", last_event_id=ids[-1]) as at_the_end:
            live = await one.publish("a", "live")
            assert [event.id for event in await take(at_the_end, 1)] == [live]
            ids[-1] = live


async def test_resume_after_an_id_that_this_process_has_not_received(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    for number in range(30):
        event_id = await one.publish("a", str(number))
        async with two.subscribe("a", last_event_id=event_id) as subscription:  # two may not have the event yet
            await one.publish("a", "next")
            assert data(await take(subscription, 1)) == ["next"]


async def test_replay_continues_into_live_events_without_a_gap(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    first = await one.publish("a", "0")
    done = asyncio.Event()

    async def publish() -> None:
        for number in range(1, 300):
            await one.publish("a", str(number))
        done.set()
        await one.publish("a", "last")

    publisher = asyncio.ensure_future(publish())
    cold = await brokers.open()
    while not done.is_set():
        for broker in (two, cold):
            async with broker.subscribe("a", last_event_id=first) as subscription:
                seen = await take(subscription, 20)
                assert data(seen) == [str(number) for number in range(1, 21)]
    await publisher
    for broker in (one, two, cold):
        events = await take_until(broker.subscribe("*", last_event_id=first), "last")
        assert data(events) == [*map(str, range(1, 300)), "last"]


@pytest.mark.usefixtures("limits_per_channel")
async def test_resume_after_a_trimmed_event_gets_a_reset(brokers: Brokers) -> None:
    options = {"history": 5}
    one, two = await brokers.pair(**options)
    ids = [await one.publish("busy", str(number)) for number in range(400)]  # Redis trims in steps of 100 entries
    quiet = await one.publish("quiet", "x")
    await wait_for(two, quiet)
    for broker in (one, two, await brokers.open(**options)):
        async with broker.subscribe("busy", "quiet", last_event_id=ids[0]) as subscription:
            (reset,) = await take(subscription, 1)
            assert type_and_reason(reset) == ("reset", "expired")
            assert reset.id == quiet
        async with broker.subscribe("busy", last_event_id=ids[-6]) as subscription:
            assert data(await take(subscription, 5)) == ["395", "396", "397", "398", "399"]
        async with broker.subscribe("quiet", last_event_id=ids[0]) as subscription:  # it has lost no event
            assert data(await take(subscription, 1)) == ["x"]


async def test_foreign_id_gets_a_reset_and_continues_live(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    event_id = await one.publish("a", "x")
    await wait_for(two, event_id)
    for broker in (one, two):
        ahead = f"{epoch(one)}-{offset_of(event_id) + 1}"
        for wrong, reason in ((ahead, "unknown"), ("1", "unknown"), ("x" * 500, "unknown"), ("0-7", "epoch")):
            async with broker.subscribe("a", last_event_id=wrong) as subscription:
                (reset,) = await take(subscription, 1)
                assert type_and_reason(reset) == ("reset", reason)
                assert reset.id == event_id
                assert subscription.last_event_id == event_id
                event_id = await one.publish("a", "next")
                assert data(await take(subscription, 1)) == ["next"]
                await wait_for(two, event_id)


async def test_slow_subscriber_gets_a_reset(brokers: Brokers) -> None:
    one, two = await brokers.pair(history=5)
    slow = two.subscribe("a")
    first = await one.publish("a", "0")
    assert data(await take(slow, 1)) == ["0"]
    ids = [await one.publish("a", str(number)) for number in range(1, 200)]
    await wait_for(two, *ids)
    if isinstance(brokers.server, Nats):
        return  # the whole stream is in memory
    (reset,) = await take(slow, 1)
    assert type_and_reason(reset) == ("reset", "overflow")
    assert reset.id == ids[-1] != first


@pytest.mark.usefixtures("limits_per_channel")
async def test_forgotten_channel_resets_a_resume(brokers: Brokers) -> None:
    one, two = await brokers.pair(max_channels=3)
    ids = [await one.publish(f"c{number}", "x") for number in range(9)]
    await wait_for(two, *ids)
    start = f"{epoch(one)}-0"
    for broker in (one, two, await brokers.open(max_channels=3)):
        for names in (("c0",), ("*",), ("c0", "c8")):
            async with broker.subscribe(*names, last_event_id=start) as subscription:
                assert type_and_reason((await take(subscription, 1))[0]) == ("reset", "expired")
        async with broker.subscribe("c8", last_event_id=ids[7]) as subscription:
            assert data(await take(subscription, 1)) == ["x"]


async def test_events_older_than_max_age_are_dropped(brokers: Brokers) -> None:
    one, two = await brokers.pair(max_age=0.3)
    clock = asyncio.get_running_loop().time
    for _ in range(20):
        began = clock()
        first = await one.publish("a", "0")
        await one.publish("a", "1")
        async with two.subscribe("a", last_event_id=first) as subscription:
            seen = await take(subscription, 1)
        if clock() - began < 0.3:
            break  # else a slow machine may have let the event expire
    assert data(seen) == ["1"]
    await asyncio.sleep(0.4)
    for broker in (one, two, await brokers.open(max_age=0.3)):
        async with broker.subscribe("a", last_event_id=first) as subscription:
            assert type_and_reason((await take(subscription, 1))[0]) == ("reset", "expired")


async def test_stream_resumes_on_another_broker(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    async with open_stream(EventSourceResponse(one.subscribe("a", "b")), "/") as stream:
        for number in range(6):
            await two.publish("ab"[number % 2], str(number))
        seen = [await stream.receive(TIMEOUT_S) for _ in range(3)]
    cold = await brokers.open()
    for broker in (two, cold):
        resumed = EventSourceResponse(broker.subscribe("a", "b", last_event_id=seen[-1].id))
        async with open_stream(resumed, "/") as stream:
            assert [(await stream.receive(TIMEOUT_S)).data for _ in range(3)] == ["3", "4", "5"]


async def test_snapshot_precedes_the_events_after_it(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    total = 0

    async def add() -> str:
        nonlocal total
        total += 1
        return await one.publish("sum", str(total))

    await wait_for(two, *[await add() for _ in range(5)])
    subscription = two.subscribe("sum", snapshot=lambda: {"data": str(total), "event": "state"})
    (state,) = await take(subscription, 1)
    assert (state.event, state.data) == ("state", "5")
    await add()
    assert data(await take(subscription, 1)) == ["6"]
    again = two.subscribe("sum", snapshot=lambda: {"data": str(total), "event": "state"}, last_event_id="lost-1")
    reset, state = await take(again, 2)
    assert type_and_reason(reset) == ("reset", "epoch")
    assert (reset.id, state.data) == ("", "6")


# Other threads and event loops


async def test_publish_from_another_thread_and_loop(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    subscription = two.subscribe("a")

    def publish() -> None:
        asyncio.run(publish_some())

    async def publish_some() -> None:
        for number in range(20):
            await one.publish("a", str(number))

    await asyncio.to_thread(publish)
    assert data(await take(subscription, 20)) == [str(number) for number in range(20)]


async def test_subscribe_in_another_loop(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    first = await one.publish("a", "0")
    begun = threading.Event()
    seen: list[ServerSentEvent] = []

    async def read() -> None:
        subscription = two.subscribe("a", last_event_id=first)
        reading = asyncio.ensure_future(take_until(subscription, "last"))
        await asyncio.sleep(0)
        begun.set()
        seen.extend(await reading)

    thread = threading.Thread(target=lambda: asyncio.run(read()))
    thread.start()
    await asyncio.to_thread(begun.wait, TIMEOUT_S)
    for number in range(1, 20):
        await one.publish("a", str(number))
    await one.publish("a", "last")
    await asyncio.to_thread(thread.join, TIMEOUT_S)
    assert data(seen) == [*map(str, range(1, 20)), "last"]


async def test_synchronous_publish_without_an_event_loop(brokers: Brokers) -> None:
    one, _ = await brokers.pair(history=5)
    if brokers.server is None:
        with pytest.raises(ValueError, match="in its own process"):
            await asyncio.to_thread(asgi_sse.broker.publish, "memory://", "a", "x")
        return
    subscription = one.subscribe("a")

    def publish(*arguments: Any, **options: Any) -> str:
        assert brokers.server is not None
        return asgi_sse.broker.publish(brokers.server.url, *arguments, prefix=brokers.prefix, **options)

    ids = [await asyncio.to_thread(publish, "a", {"data": "x", "event": "y"}, idempotency_key="k") for _ in range(2)]
    assert ids[0] == ids[1]
    (event,) = await take(subscription, 1)
    assert (event.id, event.data, event.event) == (ids[0], "x", "y")
    with pytest.raises(BrokerError, match="await the publish"):
        publish("a", "x")
    with pytest.raises(ValueError, match="channel"):
        await asyncio.to_thread(publish, "a b", "x")


# Runs


async def words(release: asyncio.Event, number: int = 10) -> AsyncIterator[str]:
    for word in range(number):
        if word == 5:
            await release.wait()
        yield str(word)


async def all_of(run: Run, last_event_id: str | None = None) -> list[ServerSentEvent]:
    async with asyncio.timeout(TIMEOUT_S):
        return [event async for event in run.subscribe(last_event_id=last_event_id)]


async def test_run_is_read_and_resumed_on_every_broker(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    assert await two.find_run("r") is None
    release = asyncio.Event()
    run = await one.run("r", words(release))
    found = await two.find_run("r")
    assert found is not None
    assert found.outcome is None
    reading = asyncio.ensure_future(all_of(found))
    seen = await take(found.subscribe(), 3)
    release.set()
    everything = await reading
    assert data(everything) == [*map(str, range(10)), '{"reason":"finished"}']
    assert everything[-1].event == "end"
    assert await run.wait() == await found.wait() == "finished"
    cold = await brokers.open()
    for broker in (one, two, cold):
        ended = await broker.find_run("r")
        assert ended is not None
        assert ended.outcome == "finished"
        assert await all_of(ended) == everything
        for number, event in enumerate(everything[:-1]):
            assert await all_of(ended, event.id) == everything[number + 1 :]
        assert ended.was_seen_by(everything[-1].id)
        assert not ended.was_seen_by(everything[-2].id)
    assert seen == everything[:3]


async def test_two_brokers_that_start_one_run_share_it(brokers: Brokers) -> None:
    both = await brokers.pair()
    release = asyncio.Event()
    begun: list[Broker] = []

    async def begin(broker: Broker, *, join: bool) -> Run | BrokerError:
        async def source() -> AsyncIterator[str]:
            begun.append(broker)
            async for word in words(release):
                yield word

        try:
            return await broker.run("r", source(), join=join)
        except BrokerError as exc:
            return exc

    runs = await asyncio.gather(*(begin(broker, join=False) for broker in both))
    assert sorted(isinstance(run, Run) for run in runs) == [False, True]
    refused = next(run for run in runs if not isinstance(run, Run))
    assert "is running already" in str(refused)
    joined = await asyncio.gather(*(begin(broker, join=True) for broker in both))
    release.set()
    for run in joined:
        assert isinstance(run, Run)
        assert len(await all_of(run)) == 11
    assert len(begun) == 1
    late = await begin(both[1], join=True)
    assert isinstance(late, Run)
    assert late.outcome == "finished"
    again = await begin(both[1], join=False)  # a run that has ended may start again
    assert isinstance(again, Run)
    assert data(await all_of(again))[:10] == [*map(str, range(10))]
    assert len(begun) == 2


async def test_run_is_cancelled_from_another_broker(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    closed = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            closed.set()

    await one.run("r", source())
    found = await two.find_run("r")
    assert found is not None
    found.cancel()
    assert data(await all_of(found)) == ["first", '{"reason":"cancelled"}']
    assert closed.is_set()
    assert await found.wait() == "cancelled"


@pytest.mark.usefixtures("limits_per_channel")
async def test_run_is_kept_whole_beyond_history(brokers: Brokers) -> None:
    one, two = await brokers.pair(history=5)
    release = asyncio.Event()
    release.set()
    run = await one.run("r", words(release, 300))
    assert await run.wait() == "finished"
    for broker in (one, two, await brokers.open(history=5)):
        found = await broker.find_run("r")
        assert found is not None
        assert data(await all_of(found))[:-1] == [*map(str, range(300))]


async def test_one_process_holds_and_renews_a_lease(brokers: Brokers) -> None:
    one, two = (broker._backend for broker in await brokers.pair())
    assert await two.find_lease("r") is None
    lease, new = await one.acquire_lease("r", 1000, 60, replace_ended=False, ended_start=-1)
    assert (new, lease.outcome) == (True, "")
    assert await one.renew_lease("r", lease)
    if one is not two:
        assert await two.find_lease("r") == lease
        assert not await two.renew_lease("r", lease)


class FailingSource:
    """A source that fails when it starts."""

    def __aiter__(self) -> AsyncIterator[str]:
        raise RuntimeError("not today")


async def test_lease_is_released_if_the_caller_leaves(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    with pytest.raises(RuntimeError, match="not today"):
        await one.run("r", FailingSource())
    release = asyncio.Event()
    release.set()
    for _ in range(20):  # cancelled at each await in turn
        for turns in range(6):
            beginning = asyncio.ensure_future(one.run("r", words(release)))
            for _ in range(turns):
                await asyncio.sleep(0)
            beginning.cancel()
            await asyncio.gather(beginning, return_exceptions=True)
            run = one.runs.get("r")
            if run is not None:
                await run.wait()
    async with asyncio.timeout(TIMEOUT_S):
        while True:  # the last lease is released after the cancellation
            try:
                run = await two.run("r", words(release))
            except BrokerError:
                await asyncio.sleep(0.01)
            else:
                break
        assert await run.wait() == "finished"


async def test_waiting_for_a_run_of_another_broker_ends_at_close(brokers: Brokers) -> None:
    if brokers.server is None:
        pytest.skip("memory has only one broker")
    one = await brokers.open()
    run = await one.run("r", words(asyncio.Event()))
    async with Broker(brokers.server.url, prefix=brokers.prefix) as two:
        found = await two.find_run("r")
        assert found is not None
        waiting = asyncio.ensure_future(found.wait())
        await asyncio.sleep(0)
    with pytest.raises(BrokerError, match="the broker was closed"):
        await asyncio.wait_for(waiting, TIMEOUT_S)
    async with two:  # opened again
        found = await two.find_run("r")
        assert found is not None
        found.cancel()
        assert await asyncio.wait_for(found.wait(), TIMEOUT_S) == "cancelled"
    assert await run.wait() == "cancelled"


# Statistics and state


async def test_statistics_count_events_and_subscriptions(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    subscription = two.subscribe("a")
    await one.publish("a", "x")
    await take(subscription, 1)
    statistics = two.statistics()
    assert statistics.state == ("local" if brokers.server is None else "connected")
    assert (statistics.error, statistics.received, statistics.subscriptions, statistics.reconnects) == ("", 1, 1, 0)
    assert one.statistics().published == 1
    assert offset_of(statistics.last_event_id) == 1


async def test_lag_is_that_of_the_slowest_subscription(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    slow, fast = two.subscribe("a"), two.subscribe("a", "b.*")
    begun = [asyncio.ensure_future(take(subscription, 1)) for subscription in (slow, fast)]
    await asyncio.sleep(0)
    await one.publish("a", "first")
    await asyncio.gather(*begun)
    assert two.statistics().lag == 0
    await wait_for(two, *[await one.publish(name, name) for name in ("a", "a", "b.c", "a", "c")])
    assert two.statistics().lag == 4  # of the fast one, which reads more channels
    assert data(await take(fast, 4)) == ["a", "a", "b.c", "a"]
    assert two.statistics().lag == 3
    assert data(await take(slow, 1)) == ["a"]
    assert two.statistics().lag == 2
    assert data(await take(slow, 2)) == ["a", "a"]
    assert two.statistics().lag == 0
    await wait_for(two, await one.publish("a", "after the last read"))
    await slow.aclose()
    await fast.aclose()
    assert two.statistics().lag == 0


async def test_round_trip_is_measured(brokers: Brokers) -> None:
    broker = await brokers.open()
    assert broker.statistics().round_trip == 0
    began = asyncio.get_running_loop().time()
    for number in range(3):
        await wait_for(broker, await broker.publish("a", number))
    if brokers.server is None:
        assert broker.statistics().round_trip == 0
        return
    async with asyncio.timeout(TIMEOUT_S):
        while not broker.statistics().round_trip:
            await asyncio.sleep(0.001)
    assert broker.statistics().round_trip < asyncio.get_running_loop().time() - began


async def test_closed_broker_refuses_calls_and_opens_again(brokers: Brokers) -> None:
    if brokers.server is None:
        pytest.skip("memory is always open")
    broker = Broker(brokers.server.url, prefix=brokers.prefix)
    calls: list[Callable[[], Awaitable[Any]]] = [lambda: broker.publish("a", "x"), lambda: broker.find_run("r")]
    for call in calls:
        with pytest.raises(BrokerError, match="is not open"):
            await call()
    with pytest.raises(BrokerError, match="is not open"):
        broker.subscribe("a")
    with pytest.raises(BrokerError, match="works in memory only"):
        broker.publish_nowait("a", "x")
    async with broker:
        event_id = await broker.publish("a", "x")
    async with broker:  # opened again, with the same log
        await broker.publish("a", "y")
        assert data(await take(broker.subscribe("a", last_event_id=event_id), 1)) == ["y"]
    assert broker.statistics().state == "closed"
