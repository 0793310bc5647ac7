"""Where a subscription begins whose broker is a part of a log on another machine: what faults of engines have found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import anyio
import pytest

from asgi_sse import Broker, ServerSentEvent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asgi_sse.broker.dispatcher import Dispatcher

pytestmark = pytest.mark.anyio


class Upstream:
    """A log that has nothing which is not here, and tells how far it is when the test says so."""

    def __init__(self, broker: Broker) -> None:
        self.dispatcher: Dispatcher = broker._dispatcher
        self.dispatcher.upstream = self
        self.asked = anyio.Event()
        self.answers = anyio.Event()

    async def sync(self) -> None:
        self.asked.set()
        await self.answers.wait()

    async def recall(self, channels: list[str]) -> None:
        pass

    def bring(self, *numbers: int) -> None:
        for number in numbers:
            self.dispatcher.publish("c.x", ServerSentEvent(str(number)), offset=number)


@pytest.mark.parametrize("name", ["c.x", "c.*"])
async def test_an_id_of_the_next_log_is_no_reset_when_that_comes(name: str) -> None:
    broker = Broker()
    upstream = Upstream(broker)
    upstream.bring(1, 2, 3)
    reader = broker.subscribe(name, last_event_id="next-2")  # of another process, which is there already
    events: list[ServerSentEvent] = []

    async def read() -> None:
        events.extend([await anext(reader), await anext(reader)])

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await upstream.asked.wait()
            upstream.dispatcher.restart("next", 0, floor=0)
            upstream.bring(1, 2, 3, 4)
            upstream.answers.set()
    assert [event.id for event in events] == ["next-3", "next-4"]


async def test_an_id_of_the_log_before_is_a_reset_though_it_is_asked_for_while_the_next_one_comes() -> None:
    broker = Broker()
    upstream = Upstream(broker)
    reader = broker.subscribe("c.x", last_event_id=f"{upstream.dispatcher.log.epoch}-2")  # ahead of this process
    events: list[ServerSentEvent] = []

    async def read() -> None:
        events.append(await anext(reader))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await upstream.asked.wait()
            upstream.dispatcher.restart("next", 0, floor=0)
            upstream.bring(1, 2, 3)
            upstream.answers.set()
    assert [(event.event, event.id) for event in events] == [("reset", "next-3")]
    assert json.loads(events[0].data or "") == {"reason": "epoch"}


async def test_a_pattern_knows_of_a_channel_of_which_all_was_missed() -> None:
    broker = Broker()
    upstream = Upstream(broker)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anext, broker.subscribe("c.*"))  # the pattern is known before the channel
        await anyio.sleep(0.1)
        upstream.dispatcher.miss("c.new", 5)
        upstream.dispatcher.log.skip(5)
        reader = broker.subscribe("c.*", last_event_id=upstream.dispatcher.log.id_of(2))
        with anyio.fail_after(5):
            assert (await anext(reader)).event == "reset"
        tasks.cancel_scope.cancel()


async def test_who_reads_a_run_that_has_ended_comes_to_its_end_where_the_log_becomes_another_one() -> None:
    broker = Broker()
    upstream = Upstream(broker)
    upstream.answers.set()
    upstream.bring(1, 2, 3)
    run = await broker.run("c.r", ["0", "1"])
    with anyio.fail_after(5):
        await run.wait()
        reader = run.subscribe()
        assert (await anext(reader)).data == "0"
        upstream.dispatcher.restart("next", 1, floor=1)
        for rest, reason in ((reader, "epoch"), (run.subscribe(), "expired")):
            told = [event async for event in rest]
            assert [(event.event, json.loads(event.data or "")) for event in told] == [("reset", {"reason": reason})]
            assert run.was_seen_by(told[0].id)


async def test_a_run_that_was_taken_for_lost_publishes_no_more() -> None:
    """Another process may begin one of that name by now."""
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
        reader = run.subscribe()
        assert (await anext(reader)).data == "0"
        upstream.dispatcher.publish("c.r", ServerSentEvent({"reason": "lost"}, event="end"), end="lost")
        assert [event.event async for event in reader] == ["end"]
        assert await run.wait() == "lost"
        await stopped.wait()
    assert upstream.dispatcher.log.last_offset == 2
