"""What `asgi_sse.broker.backends.base.Backend` promises, asked of every engine: of memory, and of real servers.

There are two brokers on one engine, as of two processes; in memory it is one, twice.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import count
from typing import Any

import pytest
from engines import ENGINES, Engine, Nats

import asgi_sse.broker
from asgi_sse import Broker, BrokerError, EventSourceResponse, InvalidEventError, Run, ServerSentEvent, Subscription
from asgi_sse.testing import open_stream

pytestmark = [pytest.mark.anyio, pytest.mark.real_time]

PATIENCE = 10.0
_prefixes = (f"t{number}" for number in count())


@pytest.fixture
def anyio_backend() -> str:
    """The clients of the engines know no other event loop; memory on trio has tests of its own."""
    return "asyncio"


@pytest.fixture(scope="module", params=[None, *ENGINES], ids=lambda engine: engine.name if engine else "memory")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine | None]:
    if request.param is None:
        yield None
        return
    if not request.param.available():
        pytest.skip(f"{request.param.name} is not installed")
    with request.param(tmp_path_factory.mktemp("engine"), sync=False) as engine:
        yield engine


@pytest.fixture
def by_channel(engine: Engine | None) -> None:
    """Each channel has a history of its own."""
    if isinstance(engine, Nats):
        pytest.skip("the limits of its stream bound all channels together")


class Brokers:
    """Opens brokers on one engine."""

    def __init__(self, engine: Engine | None, stack: AsyncExitStack) -> None:
        self.engine = engine
        self.prefix = next(_prefixes)
        self._stack = stack
        self._only: Broker | None = None

    async def open(self, **options: Any) -> Broker:
        if self.engine is None:
            if self._only is None:
                self._only = await self._stack.enter_async_context(Broker(**options))
            return self._only
        return await self._stack.enter_async_context(Broker(self.engine.url, prefix=self.prefix, **options))

    async def pair(self, **options: Any) -> tuple[Broker, Broker]:
        return await self.open(**options), await self.open(**options)


@pytest.fixture
async def brokers(engine: Engine | None) -> AsyncIterator[Brokers]:
    async with AsyncExitStack() as stack:
        yield Brokers(engine, stack)


async def take(subscription: Subscription, number: int) -> list[ServerSentEvent]:
    async with asyncio.timeout(PATIENCE):
        return [await subscription.__anext__() for _ in range(number)]


async def until(subscription: Subscription, data: str) -> list[ServerSentEvent]:
    """All events up to the one with that data."""
    events: list[ServerSentEvent] = []
    async with asyncio.timeout(PATIENCE):
        async for event in subscription:
            events.append(event)
            if event.data == data:
                break
    return events


async def here(broker: Broker, *events: str) -> None:
    """Wait until `broker` has all of these."""
    async with asyncio.timeout(PATIENCE):
        while number_of(broker.statistics().last_event_id) < max(map(number_of, events)):
            await asyncio.sleep(0.001)


def number_of(event_id: str | None) -> int:
    return int((event_id or "").partition("-")[2])


def data(events: list[ServerSentEvent]) -> list[str | None]:
    return [event.data for event in events]


def reset(event: ServerSentEvent) -> tuple[str | None, str]:
    return event.event, json.loads(event.data or "{}").get("reason")


# Order


async def test_all_see_one_order_with_the_same_ids(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    names = [("a",), ("a", "b.x"), ("b.*",), ("**",)]
    subscriptions = {(node, name): node.subscribe(*name) for node in (one, two) for name in names}
    readers = {
        key: asyncio.ensure_future(
            until(subscription, "last") if key[1] == ("**",) else take(subscription, EACH[key[1]])
        )
        for key, subscription in subscriptions.items()
    }
    await asyncio.sleep(0)

    async def publish(node: Broker, who: str) -> list[str]:
        return [await node.publish(["a", "b.x", "b.y"][number % 3], f"{who} {number}") for number in range(30)]

    ids = await asyncio.gather(
        *(publish(node, f"{place}{task}") for place, node in enumerate((one, two)) for task in "xy")
    )
    last = await one.publish("c", "last")
    seen = {key: await reader for key, reader in readers.items()}
    for name in names:
        assert seen[one, name] == seen[two, name]
    everything = seen[one, ("**",)]
    assert len(everything) == 121
    assert everything[-1].id == last
    assert sorted(number_of(event.id) for event in everything) == [number_of(event.id) for event in everything]
    for own in ids:  # of one task: in its order
        assert own == sorted(own, key=number_of)
        assert set(own) <= {event.id for event in everything}
    assert len({event.id for event in everything}) == 121


EACH = {("a",): 40, ("a", "b.x"): 80, ("b.*",): 80}


async def test_an_event_comes_as_it_was_published(brokers: Brokers) -> None:
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
async def test_a_channel_may_be_called_so(brokers: Brokers, name: str) -> None:
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


async def test_what_cannot_be_published_is_refused(brokers: Brokers) -> None:
    one, _ = await brokers.pair()
    with pytest.raises(InvalidEventError, match="an event to publish must have no id, got id="):
        await one.publish("a", ServerSentEvent("x", id="1"))
    with pytest.raises(InvalidEventError, match="is no event"):
        await one.publish("a", object())
    for name in ("", "a b", "a.*", "!control", "ä", "a..b"):
        with pytest.raises(ValueError, match="channel"):
            await one.publish(name, "x")
    for key in ("", "x" * 201, 7):
        with pytest.raises(ValueError, match="idempotency_key"):
            await one.publish("a", "x", idempotency_key=key)  # type: ignore[arg-type]


# Once


async def test_a_key_makes_it_safe_to_publish_again(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    subscription = two.subscribe("**")
    first = await one.publish("a", "first", idempotency_key="k:1")
    again = await asyncio.gather(*(node.publish("a", "again", idempotency_key="k:1") for node in (one, two, one, two)))
    assert again == [first] * 4
    assert await two.publish("b", "another channel", idempotency_key="k:1") != first
    assert await two.publish("a", "another key", idempotency_key="k:2") != first
    assert data(await take(subscription, 3)) == ["first", "another channel", "another key"]


# Resume


async def test_who_comes_back_at_any_place_and_node_has_all_that_follows(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    ids = [await (one, two)[number % 2].publish("ab"[number % 3 == 0], str(number)) for number in range(12)]
    cold = await brokers.open()  # it has seen none of it
    for node in (one, two, cold):
        for number, place in enumerate(ids):
            for names, wanted in ((("a", "b"), "ab"), (("*",), "ab"), (("b",), "b"), (("**", "a"), "ab")):
                rest = [str(later) for later in range(number + 1, 12) if "ab"[later % 3 == 0] in wanted]
                async with node.subscribe(*names, last_event_id=place) as subscription:
                    assert data(await take(subscription, len(rest))) == rest
        await here(node, *ids)
        async with node.subscribe("a", last_event_id=ids[-1]) as at_the_end:
            pull_source = await one.publish("a", "live")
            assert [event.id for event in await take(at_the_end, 1)] == [pull_source]
            ids[-1] = pull_source


async def test_an_id_that_this_process_has_not_come_to_yet(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    for number in range(30):
        place = await one.publish("a", str(number))
        async with two.subscribe("a", last_event_id=place) as subscription:  # two may be behind
            await one.publish("a", "next")
            assert data(await take(subscription, 1)) == ["next"]


async def test_replay_and_live_are_one_read(brokers: Brokers) -> None:
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
        for node in (two, cold):
            async with node.subscribe("a", last_event_id=first) as subscription:
                seen = await take(subscription, 20)
                assert data(seen) == [str(number) for number in range(1, 21)]
    await publisher
    for node in (one, two, cold):
        assert data(await until(node.subscribe("*", last_event_id=first), "last")) == [*map(str, range(1, 300)), "last"]


@pytest.mark.usefixtures("by_channel")
async def test_what_is_not_kept_any_more_is_told(brokers: Brokers) -> None:
    options = {"history": 5}
    one, two = await brokers.pair(**options)
    ids = [await one.publish("busy", str(number)) for number in range(400)]  # streams keep up to a node of 100 more
    quiet = await one.publish("quiet", "x")
    await here(two, quiet)
    for node in (one, two, await brokers.open(**options)):
        async with node.subscribe("busy", "quiet", last_event_id=ids[0]) as subscription:
            (told,) = await take(subscription, 1)
            assert reset(told) == ("reset", "expired")
            assert told.id == quiet
        async with node.subscribe("busy", last_event_id=ids[-6]) as subscription:
            assert data(await take(subscription, 5)) == ["395", "396", "397", "398", "399"]
        async with node.subscribe("quiet", last_event_id=ids[0]) as subscription:  # nothing of it is missing
            assert data(await take(subscription, 1)) == ["x"]


async def test_ids_that_are_none_of_the_log(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    place = await one.publish("a", "x")
    await here(two, place)
    for node in (one, two):
        ahead = f"{epoch(one)}-{number_of(place) + 1}"
        for wrong, reason in ((ahead, "unknown"), ("1", "unknown"), ("x" * 500, "unknown"), ("0-7", "epoch")):
            async with node.subscribe("a", last_event_id=wrong) as subscription:
                (told,) = await take(subscription, 1)
                assert reset(told) == ("reset", reason)
                assert told.id == place
                assert subscription.last_event_id == place
                place = await one.publish("a", "next")
                assert data(await take(subscription, 1)) == ["next"]
                await here(two, place)


async def test_who_is_too_slow_is_told(brokers: Brokers) -> None:
    one, two = await brokers.pair(history=5)
    slow = two.subscribe("a")
    first = await one.publish("a", "0")
    assert data(await take(slow, 1)) == ["0"]
    ids = [await one.publish("a", str(number)) for number in range(1, 200)]
    await here(two, *ids)
    if isinstance(brokers.engine, Nats):
        return  # all of its stream is here
    (told,) = await take(slow, 1)
    assert reset(told) == ("reset", "overflow")
    assert told.id == ids[-1] != first


@pytest.mark.usefixtures("by_channel")
async def test_channels_beyond_the_most_there_may_be_are_forgotten_and_that_is_told(brokers: Brokers) -> None:
    one, two = await brokers.pair(max_channels=3)
    ids = [await one.publish(f"c{number}", "x") for number in range(9)]
    await here(two, *ids)
    start = f"{epoch(one)}-0"
    for node in (one, two, await brokers.open(max_channels=3)):
        for names in (("c0",), ("*",), ("c0", "c8")):
            async with node.subscribe(*names, last_event_id=start) as subscription:
                assert reset((await take(subscription, 1))[0]) == ("reset", "expired")
        async with node.subscribe("c8", last_event_id=ids[7]) as subscription:
            assert data(await take(subscription, 1)) == ["x"]


async def test_what_is_too_old_is_gone(brokers: Brokers) -> None:
    one, two = await brokers.pair(max_age=0.3)
    clock = asyncio.get_running_loop().time
    for _ in range(20):
        began = clock()
        first = await one.publish("a", "0")
        await one.publish("a", "1")
        async with two.subscribe("a", last_event_id=first) as subscription:
            seen = await take(subscription, 1)
        if clock() - began < 0.3:
            break  # else the machine has stood still, and it may be gone
    assert data(seen) == ["1"]
    await asyncio.sleep(0.4)
    for node in (one, two, await brokers.open(max_age=0.3)):
        async with node.subscribe("a", last_event_id=first) as subscription:
            assert reset((await take(subscription, 1))[0]) == ("reset", "expired")


async def test_a_stream_resumes_on_the_other_node(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    async with open_stream(EventSourceResponse(one.subscribe("a", "b")), "/") as stream:
        for number in range(6):
            await two.publish("ab"[number % 2], str(number))
        seen = [await stream.receive(PATIENCE) for _ in range(3)]
    cold = await brokers.open()
    for node in (two, cold):
        resumed = EventSourceResponse(node.subscribe("a", "b", last_event_id=seen[-1].id))
        async with open_stream(resumed, "/") as stream:
            assert [(await stream.receive(PATIENCE)).data for _ in range(3)] == ["3", "4", "5"]


async def test_a_snapshot_comes_before_what_changes_it(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    total = 0

    async def add() -> str:
        nonlocal total
        total += 1
        return await one.publish("sum", str(total))

    await here(two, *[await add() for _ in range(5)])
    subscription = two.subscribe("sum", snapshot=lambda: {"data": str(total), "event": "state"})
    (state,) = await take(subscription, 1)
    assert (state.event, state.data) == ("state", "5")
    await add()
    assert data(await take(subscription, 1)) == ["6"]
    again = two.subscribe("sum", snapshot=lambda: {"data": str(total), "event": "state"}, last_event_id="lost-1")
    told, state = await take(again, 2)
    assert reset(told) == ("reset", "epoch")
    assert (told.id, state.data) == ("", "6")


# From elsewhere


async def test_other_threads_and_loops_publish(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    subscription = two.subscribe("a")

    def publish() -> None:
        asyncio.run(publish_some())

    async def publish_some() -> None:
        for number in range(20):
            await one.publish("a", str(number))

    await asyncio.to_thread(publish)
    assert data(await take(subscription, 20)) == [str(number) for number in range(20)]


async def test_a_reader_in_another_loop(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    first = await one.publish("a", "0")
    begun = threading.Event()
    seen: list[ServerSentEvent] = []

    async def read() -> None:
        subscription = two.subscribe("a", last_event_id=first)
        reading = asyncio.ensure_future(until(subscription, "last"))
        await asyncio.sleep(0)
        begun.set()
        seen.extend(await reading)

    thread = threading.Thread(target=lambda: asyncio.run(read()))
    thread.start()
    await asyncio.to_thread(begun.wait, PATIENCE)
    for number in range(1, 20):
        await one.publish("a", str(number))
    await one.publish("a", "last")
    await asyncio.to_thread(thread.join, PATIENCE)
    assert data(seen) == [*map(str, range(1, 20)), "last"]


async def test_publish_from_where_no_loop_runs(brokers: Brokers) -> None:
    one, _ = await brokers.pair(history=5)
    if brokers.engine is None:
        with pytest.raises(ValueError, match="in its own process"):
            await asyncio.to_thread(asgi_sse.broker.publish, "memory://", "a", "x")
        return
    subscription = one.subscribe("a")

    def publish(*arguments: Any, **options: Any) -> str:
        assert brokers.engine is not None
        return asgi_sse.broker.publish(brokers.engine.url, *arguments, prefix=brokers.prefix, **options)

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
    async with asyncio.timeout(PATIENCE):
        return [event async for event in run.subscribe(last_event_id=last_event_id)]


async def test_a_run_is_read_and_resumed_on_every_node(brokers: Brokers) -> None:
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
    for node in (one, two, cold):
        ended = await node.find_run("r")
        assert ended is not None
        assert ended.outcome == "finished"
        assert await all_of(ended) == everything
        for number, event in enumerate(everything[:-1]):
            assert await all_of(ended, event.id) == everything[number + 1 :]
        assert ended.was_seen_by(everything[-1].id)
        assert not ended.was_seen_by(everything[-2].id)
    assert seen == everything[:3]


async def test_two_nodes_that_begin_one_run_agree(brokers: Brokers) -> None:
    nodes = await brokers.pair()
    release = asyncio.Event()
    begun: list[Broker] = []

    async def begin(node: Broker, *, join: bool) -> Run | BrokerError:
        async def source() -> AsyncIterator[str]:
            begun.append(node)
            async for word in words(release):
                yield word

        try:
            return await node.run("r", source(), join=join)
        except BrokerError as exc:
            return exc

    runs = await asyncio.gather(*(begin(node, join=False) for node in nodes))
    assert sorted(isinstance(run, Run) for run in runs) == [False, True]
    refused = next(run for run in runs if not isinstance(run, Run))
    assert "is running already" in str(refused)
    joined = await asyncio.gather(*(begin(node, join=True) for node in nodes))
    release.set()
    for run in joined:
        assert isinstance(run, Run)
        assert len(await all_of(run)) == 11
    assert len(begun) == 1
    late = await begin(nodes[1], join=True)
    assert isinstance(late, Run)
    assert late.outcome == "finished"
    again = await begin(nodes[1], join=False)  # one that has ended may be begun again
    assert isinstance(again, Run)
    assert data(await all_of(again))[:10] == [*map(str, range(10))]
    assert len(begun) == 2


async def test_a_run_is_cancelled_from_the_other_node(brokers: Brokers) -> None:
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


@pytest.mark.usefixtures("by_channel")
async def test_a_run_is_kept_whole_whatever_the_history(brokers: Brokers) -> None:
    one, two = await brokers.pair(history=5)
    release = asyncio.Event()
    release.set()
    run = await one.run("r", words(release, 300))
    assert await run.wait() == "finished"
    for node in (one, two, await brokers.open(history=5)):
        found = await node.find_run("r")
        assert found is not None
        assert data(await all_of(found))[:-1] == [*map(str, range(300))]


class Refuses:
    """A source that cannot be begun."""

    def __aiter__(self) -> AsyncIterator[str]:
        raise RuntimeError("not today")


async def test_a_claim_that_nobody_has_got_is_given_back(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    with pytest.raises(RuntimeError, match="not today"):
        await one.run("r", Refuses())
    release = asyncio.Event()
    release.set()
    for _ in range(20):  # cut at each place that there is
        for turns in range(6):
            beginning = asyncio.ensure_future(one.run("r", words(release)))
            for _ in range(turns):
                await asyncio.sleep(0)
            beginning.cancel()
            await asyncio.gather(beginning, return_exceptions=True)
            run = one.runs.get("r")
            if run is not None:
                await run.wait()
    async with asyncio.timeout(PATIENCE):
        while True:  # the last one is given back behind the cancellation
            try:
                run = await two.run("r", words(release))
            except BrokerError:
                await asyncio.sleep(0.01)
            else:
                break
        assert await run.wait() == "finished"


async def test_waiting_for_a_run_of_another_node_ends_with_the_broker(brokers: Brokers) -> None:
    if brokers.engine is None:
        pytest.skip("it has no other node")
    one = await brokers.open()
    run = await one.run("r", words(asyncio.Event()))
    async with Broker(brokers.engine.url, prefix=brokers.prefix) as two:
        found = await two.find_run("r")
        assert found is not None
        waiting = asyncio.ensure_future(found.wait())
        await asyncio.sleep(0)
    with pytest.raises(BrokerError, match="the broker was closed"):
        await asyncio.wait_for(waiting, PATIENCE)
    async with two:  # again
        found = await two.find_run("r")
        assert found is not None
        found.cancel()
        assert await asyncio.wait_for(found.wait(), PATIENCE) == "cancelled"
    assert await run.wait() == "cancelled"


# The engine itself


async def test_statistics(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    subscription = two.subscribe("a")
    await one.publish("a", "x")
    await take(subscription, 1)
    figures = two.statistics()
    assert figures.state == ("local" if brokers.engine is None else "connected")
    assert (figures.error, figures.received, figures.subscriptions, figures.reconnects) == ("", 1, 1, 0)
    assert one.statistics().published == 1
    assert number_of(figures.last_event_id) == 1


async def test_statistics_tell_how_far_the_slowest_reader_is_behind(brokers: Brokers) -> None:
    one, two = await brokers.pair()
    slow, fast = two.subscribe("a"), two.subscribe("a", "b.*")
    begun = [asyncio.ensure_future(take(subscription, 1)) for subscription in (slow, fast)]
    await asyncio.sleep(0)
    await one.publish("a", "first")
    await asyncio.gather(*begun)
    assert two.statistics().lag == 0
    await here(two, *[await one.publish(name, name) for name in ("a", "a", "b.c", "a", "c")])
    assert two.statistics().lag == 4  # of the fast one, which reads more
    assert data(await take(fast, 4)) == ["a", "a", "b.c", "a"]
    assert two.statistics().lag == 3
    assert data(await take(slow, 1)) == ["a"]
    assert two.statistics().lag == 2
    assert data(await take(slow, 2)) == ["a", "a"]
    assert two.statistics().lag == 0
    await here(two, await one.publish("a", "for nobody any more"))
    await slow.aclose()
    await fast.aclose()
    assert two.statistics().lag == 0


async def test_statistics_tell_how_long_events_take(brokers: Brokers) -> None:
    broker = await brokers.open()
    assert broker.statistics().round_trip == 0
    began = asyncio.get_running_loop().time()
    for number in range(3):
        await here(broker, await broker.publish("a", number))
    if brokers.engine is None:
        assert broker.statistics().round_trip == 0
        return
    async with asyncio.timeout(PATIENCE):
        while not broker.statistics().round_trip:
            await asyncio.sleep(0.001)
    assert broker.statistics().round_trip < asyncio.get_running_loop().time() - began


async def test_a_broker_that_is_not_open_says_so(brokers: Brokers) -> None:
    if brokers.engine is None:
        pytest.skip("memory is always open")
    broker = Broker(brokers.engine.url, prefix=brokers.prefix)
    calls: list[Callable[[], Awaitable[Any]]] = [lambda: broker.publish("a", "x"), lambda: broker.find_run("r")]
    for call in calls:
        with pytest.raises(BrokerError, match="is not open"):
            await call()
    with pytest.raises(BrokerError, match="is not open"):
        broker.subscribe("a")
    with pytest.raises(BrokerError, match="needs a broker in memory"):
        broker.publish_nowait("a", "x")
    async with broker:
        place = await broker.publish("a", "x")
    async with broker:  # again, where it was
        await broker.publish("a", "y")
        assert data(await take(broker.subscribe("a", last_event_id=place), 1)) == ["y"]
    assert broker.statistics().state == "closed"
