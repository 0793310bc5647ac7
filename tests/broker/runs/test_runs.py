"""Runs and their clients: a run outlives its clients, and their streams end with it."""

import gc
import json
import random
import weakref
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_clients import app_of, data_of, words, words_and_end

from asgi_sse import (
    Broker,
    BrokerError,
    EventSourceResponse,
    Request,
    ServerSentEvent,
    StreamClosedError,
    StreamRegistry,
    create_app,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


async def test_clients_can_come_late_and_reconnect() -> None:
    broker = Broker()
    app = app_of(broker)
    run = await broker.run("chat", words())
    async with open_stream(app, "/runs/chat") as stream:
        assert (await stream.receive()).data == "word 0"
        last = stream.last_event_id
    await anyio.sleep(2.5)  # without clients
    assert run.outcome is None
    async with open_stream(app, "/runs/chat", headers={"Last-Event-ID": last}) as stream:
        assert await data_of(stream) == words_and_end(5)[1:]
        assert stream.last_event_id
        last = stream.last_event_id
    assert await run.wait() == "finished"
    assert run.error is None
    assert repr(run) == "Run('chat')"
    for path in ("/runs/chat", "/chat", f"/runs/chat?last_event_id={last}"):
        async with open_stream(app, path) as stream:
            if "?" in path:
                assert stream.status == 204
            else:
                assert await data_of(stream) == words_and_end(5)
        async with open_stream(app, path, headers={"Last-Event-ID": last}) as stream:
            assert stream.status == 204  # at which an EventSource stops
            assert await stream.read() == b""


async def test_endpoint_can_begin_and_return_a_run() -> None:
    broker = Broker()

    async def chat(request: Request) -> Any:
        return await broker.run("chat", words())

    async with open_stream(create_app({"/chat": chat}), "/chat", method="POST") as stream:
        assert (await stream.receive()).data == "word 0"
        await stream.disconnect()
    run = broker.runs["chat"]
    assert await run.wait() == "finished"
    assert [event.data async for event in run.subscribe()] == words_and_end(5)


async def test_loop_gets_the_final_event_despite_a_filter() -> None:
    broker = Broker()
    run = await broker.run("chat", words())
    seen = []
    async for event in run.subscribe(filter=lambda event: event.data in {"word 1", "word 3"}):
        seen.append(event)
        if len(seen) == 1:
            assert event.data == "word 1"
    assert [event.data for event in seen] == [
        "word 1",
        "word 3",
        '{"reason":"finished"}',
    ]  # the filter cannot exclude the end
    assert seen[-1].event == "end"
    assert [event async for event in run.subscribe(last_event_id=seen[-1].id)] == []


async def test_client_that_lacks_only_the_final_event_gets_it() -> None:
    broker = Broker()
    run = await broker.run("chat", words(3))
    events = [event async for event in run.subscribe()]
    async with open_stream(app_of(broker), "/runs/chat", headers={"Last-Event-ID": str(events[-2].id)}) as stream:
        assert await data_of(stream) == ['{"reason":"finished"}']


async def test_stream_of_several_channels_continues_after_a_run() -> None:
    broker = Broker()
    async with open_stream(EventSourceResponse(broker.subscribe("chat", "news"))) as stream:
        await (await broker.run("chat", words(1))).wait()  # not a list, since virtual time does not wait for its thread
        await broker.publish("news", "b")
        assert [(await stream.receive()).data for _ in range(3)] == [*words_and_end(1), "b"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
async def test_clients_that_reconnect_at_random_see_each_event_once(seed: int) -> None:
    """In the end, every client has every event of the run once and in order, wherever its streams were cut."""
    chance = random.Random(seed)
    broker = Broker(history=1, max_channels=1)
    events = chance.randrange(30)

    async def source() -> AsyncIterator[str]:
        for number in range(events):
            if chance.random() < 0.7:
                await anyio.lowlevel.checkpoint()
            yield f"word {number}"
            await broker.publish(f"other.{number}", "x")

    app = app_of(broker)
    run = await broker.run("chat", source())

    async def client() -> None:
        seen: list[str] = []
        last, status = "", 200
        while status == 200:
            async with open_stream(app, "/runs/chat", headers={"Last-Event-ID": last} if last else {}) as stream:
                status = stream.status
                with anyio.move_on_after(0 if chance.random() < 0.3 else None):
                    for _ in range(chance.randrange(10)):
                        try:
                            seen.append(str((await stream.receive(10)).data))
                        except StreamClosedError:
                            break
                # The decoder has committed the ids of all events of a message, so they count as seen.
                while stream._events:
                    seen.append(str(stream._events.popleft().data))
                last = stream.last_event_id or last
        assert status == 204
        assert seen == words_and_end(events)

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(client)
            await anyio.lowlevel.checkpoint()
    assert run.outcome == "finished"
    assert broker.subscribers("chat") == 0


# Limits


async def test_max_lifetime_ends_a_run() -> None:
    broker = Broker()
    run = await broker.run("chat", words(100), max_lifetime=2.5)
    assert [event.data async for event in run.subscribe()] == words_and_end(3, "expired")


async def test_max_bytes_drops_the_first_events_and_resets_late_clients() -> None:
    broker = Broker(history=2)  # does not apply to runs
    run = await broker.run("chat", words(100, 0), max_bytes=10_000)
    await run.wait()
    events = [event async for event in run.subscribe()]
    assert (events[0].event, events[0].data) == ("reset", '{"reason":"expired"}')
    assert [event.data for event in events[1:]] == words_and_end(100)[-len(events) + 1 :]
    assert 10 < len(events) < 40
    async with open_stream(app_of(broker), "/runs/chat", headers={"Last-Event-ID": "old-1"}) as stream:
        seen = [event async for event in stream]
    assert seen[0].data == '{"reason":"epoch"}'
    assert [event.data for event in seen[1:]] == [event.data for event in events[1:]]


async def test_run_is_not_subject_to_the_limits_of_other_channels() -> None:
    broker = Broker(history=1, max_channels=1, max_age=1)
    run = await broker.run("chat", words(3))
    for number in range(20):
        await broker.publish(f"other.{number}", "x")
        await anyio.sleep(0.5)
    assert [event.data async for event in run.subscribe()] == words_and_end(3)


async def test_run_is_kept_for_its_ttl() -> None:
    broker = Broker()
    run = await broker.run("chat", words(2), ttl=60)
    await run.wait()
    reference = weakref.ref(run)
    await anyio.sleep(59)
    assert list(broker.runs) == ["chat"]
    await anyio.sleep(2)
    assert len(broker.runs) == 0
    assert "chat" not in broker.runs
    async with open_stream(app_of(broker), "/runs/chat") as stream:
        assert stream.status == 404
    events = [event async for event in run.subscribe()]  # of the object, which the test still holds
    assert [event.event for event in events] == ["reset"]
    del run, events
    await anyio.sleep(11)
    gc.collect()
    assert reference() is None


async def test_stream_of_a_forgotten_run_is_reset_and_ends() -> None:
    broker, registry = Broker(), StreamRegistry()
    run = await broker.run("chat", ["a"], ttl=1)
    await run.wait()
    await anyio.sleep(2)
    async with open_stream(EventSourceResponse(run.subscribe(), registry=registry)) as stream:
        assert [event.event async for event in stream] == ["reset"]
        assert stream.complete


async def test_max_runs_limits_running_and_ended_runs() -> None:
    broker = Broker(max_runs=2)
    runs = [await broker.run(f"chat/{number}", words(2)) for number in range(2)]
    with pytest.raises(BrokerError, match=r"at most 2 runs may be running \(max_runs\)"):
        await broker.run("chat/2", words(2))
    for run in runs:
        await run.wait()
    for number in range(2, 5):
        await (await broker.run(f"chat/{number}", words(2))).wait()
    assert list(broker.runs) == ["chat/3", "chat/4"]  # as many ended runs are kept


async def test_forgotten_runs_do_not_reset_other_channels() -> None:
    broker = Broker()
    first = await broker.publish("orders.1", "x")
    for number in range(5):
        await (await broker.run(f"run.{number}", ["a"], ttl=0)).wait()
    await anyio.sleep(0.1)
    assert len(broker.runs) == 0
    async with broker.subscribe("orders.*", last_event_id=first) as subscription:
        await broker.publish("orders.2", "y")
        assert (await subscription.__anext__()).data == "y"


# Names, waits and arguments


async def test_run_name_is_reusable_after_the_end() -> None:
    broker = Broker()
    app = app_of(broker)
    first = await broker.run("chat", words(2))
    with pytest.raises(BrokerError, match="run chat is running already; read it by"):
        await broker.run("chat", words(2))
    events = [event async for event in first.subscribe()]
    second = await broker.run("chat", words(3))
    assert broker.runs["chat"] is second
    async with open_stream(app, "/runs/chat") as stream:
        assert await data_of(stream) == words_and_end(3)
    # A client that missed the end of the first run gets it, and then the second run.
    async with open_stream(app, "/runs/chat", headers={"Last-Event-ID": str(events[1].id)}) as stream:
        assert await data_of(stream) == ['{"reason":"finished"}', *words_and_end(3)]
    assert [event.data async for event in first.subscribe()] == words_and_end(2)


async def test_cancelled_wait_leaves_no_waiter() -> None:
    run = await Broker().run("chat", words())
    for _ in range(10):
        with anyio.move_on_after(0.01):
            await run.wait()
    assert run._waiters == []
    assert await run.wait() == "finished"


@pytest.mark.real_time
async def test_run_can_be_cancelled_and_awaited_from_other_threads() -> None:
    broker = Broker()
    run = await broker.run("chat", words(1000, 0.01))
    outcomes: list[str] = []

    async def wait() -> None:
        outcomes.append(await run.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, anyio.run, wait)
        await anyio.sleep(0.2)
        await anyio.to_thread.run_sync(run.cancel)
    assert outcomes == ["cancelled"]


async def test_invalid_run_arguments_are_refused() -> None:
    broker = Broker()
    with pytest.raises(TypeError, match="got the function words; call it"):
        await broker.run("chat", words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'a b'; remove ' '"):
        await broker.run("a b", words())
    for name in ("ttl", "max_lifetime", "max_bytes"):
        with pytest.raises(ValueError, match=rf"{name} must be (at least|more than) 0( or None)?, got -1"):
            await broker.run("chat", ["a"], **{name: -1})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=rf"{name} must be a number( or None)?, got '1'"):
            await broker.run("chat", ["a"], **{name: "1"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on_end must be a function or None, got 5"):
        await broker.run("chat", ["a"], on_end=5)  # type: ignore[arg-type]
    for name in ("max_runs", "run_grace"):
        with pytest.raises(ValueError, match=rf"{name} must be (at least|more than) 0, got -1"):
            Broker(**{name: -1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="broker must be a Broker, got str"):
        create_app({}, broker="redis://")  # type: ignore[arg-type]
    assert len(broker.runs) == 0
    assert json.loads(str(ServerSentEvent({"reason": "x"}).data)) == {"reason": "x"}
