"""Where a cursor begins and ends when the log of the broker is a part of a log on a server.

Faults of real servers found each of these cases.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import anyio
import pytest

from asgi_sse import Broker, EventSourceResponse, ServerSentEvent
from asgi_sse.testing import open_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asgi_sse import Subscription
    from asgi_sse.broker.dispatcher import Dispatcher

pytestmark = pytest.mark.anyio


class Upstream:
    """A log on a server. `sync` returns when the test sets `answers`; `recall` calls what the test sets."""

    def __init__(self, broker: Broker) -> None:
        self.on_recall: Callable[[list[str]], None] = lambda _: None
        self.dispatcher: Dispatcher = broker._dispatcher
        self.dispatcher.upstream = self
        self.asked = anyio.Event()
        self.answers = anyio.Event()

    async def sync(self) -> None:
        self.asked.set()
        await self.answers.wait()

    async def recall(self, channels: list[str]) -> None:
        self.on_recall(channels)

    def deliver(self, *offsets: int) -> None:
        for offset in offsets:
            self.dispatcher.publish("c.x", ServerSentEvent(str(offset)), offset=offset)


@pytest.mark.parametrize("name", ["c.x", "c.*"])
async def test_id_of_the_next_epoch_is_resumed_once_that_epoch_begins(name: str) -> None:
    broker = Broker()
    upstream = Upstream(broker)
    upstream.deliver(1, 2, 3)
    subscription = broker.subscribe(name, last_event_id="next-2")  # from a process that knows the next epoch already
    events: list[ServerSentEvent] = []

    async def read() -> None:
        events.extend([await anext(subscription), await anext(subscription)])

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await upstream.asked.wait()
            upstream.dispatcher.restart("next", 0, floor=0)
            upstream.deliver(1, 2, 3, 4)
            upstream.answers.set()
    assert [event.id for event in events] == ["next-3", "next-4"]


async def test_id_of_the_old_epoch_is_reset_if_the_epoch_changes_meanwhile() -> None:
    broker = Broker()
    upstream = Upstream(broker)
    subscription = broker.subscribe(
        "c.x", last_event_id=f"{upstream.dispatcher.log.epoch}-2"
    )  # from a process that is ahead of this one
    events: list[ServerSentEvent] = []

    async def read() -> None:
        events.append(await anext(subscription))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await upstream.asked.wait()
            upstream.dispatcher.restart("next", 0, floor=0)
            upstream.deliver(1, 2, 3)
            upstream.answers.set()
    assert [(event.event, event.id) for event in events] == [("reset", "next-3")]
    assert json.loads(events[0].data or "") == {"reason": "epoch"}


async def test_pattern_knows_a_channel_whose_events_were_all_missed() -> None:
    broker = Broker()
    upstream = Upstream(broker)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anext, broker.subscribe("c.*"))  # the pattern is known before the channel
        await anyio.sleep(0.1)
        upstream.dispatcher.miss("c.new", 5)
        upstream.dispatcher.log.skip(5)
        subscription = broker.subscribe("c.*", last_event_id=upstream.dispatcher.log.id_of(2))
        with anyio.fail_after(5):
            assert (await anext(subscription)).event == "reset"
        tasks.cancel_scope.cancel()


async def test_subscriptions_of_an_ended_run_end_when_the_epoch_changes() -> None:
    broker = Broker()
    upstream = Upstream(broker)
    upstream.answers.set()
    upstream.deliver(1, 2, 3)
    run = await broker.run("c.r", ["0", "1"])
    with anyio.fail_after(5):
        await run.wait()
        subscription = run.subscribe()
        assert (await anext(subscription)).data == "0"
        upstream.dispatcher.restart("next", 1, floor=1)
        for rest, reason in ((subscription, "epoch"), (run.subscribe(), "expired")):
            events = [event async for event in rest]
            assert [(event.event, json.loads(event.data or "")) for event in events] == [("reset", {"reason": reason})]
            assert run.was_seen_by(events[0].id)


async def test_run_that_was_ended_as_lost_publishes_nothing_more() -> None:
    """Another process may have begun a run of the same name."""
    broker = Broker()
    upstream = Upstream(broker)
    stopped = anyio.Event()

    async def source() -> AsyncIterator[str]:
        try:
            yield "0"
            await anyio.sleep_forever()
        finally:
            stopped.set()

    run = await broker.run("c.r", source())
    with anyio.fail_after(5):
        subscription = run.subscribe()
        assert (await anext(subscription)).data == "0"
        upstream.dispatcher.publish("c.r", ServerSentEvent({"reason": "lost"}, event="end"), end="lost")
        assert [event.event async for event in subscription] == ["end"]
        assert await run.wait() == "lost"
        await stopped.wait()
    assert upstream.dispatcher.log.last_offset == 2


async def test_id_is_reset_if_the_epoch_changes_while_its_events_are_fetched() -> None:
    broker = Broker()
    upstream = Upstream(broker)
    upstream.answers.set()
    epoch = upstream.dispatcher.log.epoch
    upstream.dispatcher.restart(epoch, 3, [("c.x", 3)], floor=0)  # the events are on the server only

    def replace_log(channels: list[str]) -> None:
        assert channels == ["c.x"]
        upstream.dispatcher.restart("next", 0, floor=0)
        upstream.deliver(1, 2, 3)

    upstream.on_recall = replace_log
    subscription = broker.subscribe("c.x", last_event_id=f"{epoch}-1")
    with anyio.fail_after(5):
        reset = await anext(subscription)
        assert (reset.event, json.loads(reset.data or ""), reset.id) == ("reset", {"reason": "epoch"}, "next-3")
        upstream.deliver(4)
        assert (await anext(subscription)).id == "next-4"


@pytest.mark.parametrize("name", ["c.x", "c.*"])
async def test_new_subscriber_is_reset_if_the_epoch_changes_before_its_first_read(name: str) -> None:
    broker = Broker()
    upstream = Upstream(broker)
    upstream.deliver(1, 2)
    subscription = broker.subscribe(name)
    upstream.dispatcher.restart("next", 1, floor=1)
    with anyio.fail_after(5):
        reset = await anext(subscription)
        assert (json.loads(reset.data or ""), reset.id) == ({"reason": "epoch"}, "next-1")
        upstream.deliver(2)
        assert (await anext(subscription)).id == "next-2"


async def test_loss_in_one_channel_resets_its_live_subscribers_only() -> None:
    broker = Broker()
    upstream = Upstream(broker)
    dispatcher = upstream.dispatcher
    by_name, by_pattern, other = broker.subscribe("c.x"), broker.subscribe("c.*"), broker.subscribe("other")
    seen: dict[str, list[str]] = {}

    async def read(key: str, subscription: Subscription) -> None:
        seen[key] = []
        async for event in subscription:
            seen[key].append(f"reset {json.loads(event.data or '')['reason']}" if event.event else str(event.data))

    async with anyio.create_task_group() as tasks:
        for key, subscription in (("name", by_name), ("pattern", by_pattern), ("other", other)):
            tasks.start_soon(read, key, subscription)
        await anyio.wait_all_tasks_blocked()
        upstream.deliver(1)
        await anyio.wait_all_tasks_blocked()
        dispatcher.log.skip(5)
        dispatcher.miss("c.x", 5)
        await anyio.wait_all_tasks_blocked()
        upstream.deliver(6)
        dispatcher.publish("other", ServerSentEvent("7"), offset=7)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert seen == {"name": ["1", "reset overflow", "6"], "pattern": ["1", "reset overflow", "6"], "other": ["7"]}


async def test_restart_in_the_same_epoch_resets_only_subscribers_that_missed_events() -> None:
    broker = Broker()
    upstream = Upstream(broker)
    upstream.deliver(1, 2, 3)
    epoch = upstream.dispatcher.log.epoch
    seen: dict[str, list[tuple[str | None, str | None]]] = {"c.x": [], "c.lost": []}

    async def read(name: str) -> None:
        async for event in broker.subscribe(name):
            seen[name].append((event.event, event.id))

    async with anyio.create_task_group() as tasks:
        for name in seen:
            tasks.start_soon(read, name)
        await anyio.wait_all_tasks_blocked()
        upstream.dispatcher.restart(epoch, 5, [("c.x", 3), ("c.lost", 5)], floor=0)
        await anyio.wait_all_tasks_blocked()
        upstream.deliver(6)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert seen == {"c.x": [(None, f"{epoch}-6")], "c.lost": [("reset", f"{epoch}-5")]}


async def test_client_that_leaves_while_its_id_is_looked_up_leaves_nothing() -> None:
    """Also if the lookup does not notice that the client left."""
    broker = Broker()
    upstream = Upstream(broker)
    response = EventSourceResponse(broker.subscribe("c.x", last_event_id="next-2"), cleanup_timeout=1)

    async def sync() -> None:
        upstream.asked.set()
        with anyio.CancelScope(shield=True):
            await upstream.answers.wait()

    upstream.sync = sync  # type: ignore[method-assign]
    async with open_stream(response) as stream:
        await upstream.asked.wait()
        assert broker.subscribers("c.x") == 1
        await stream.disconnect()
    assert broker.subscribers("c.x") == 0
    upstream.dispatcher.restart("next", 0, floor=0)
    upstream.deliver(1, 2, 3)
    upstream.answers.set()
    await anyio.wait_all_tasks_blocked()
    assert broker.subscribers("c.x") == 0
