"""Runs: a source that goes on without its clients, and streams that end when it does."""

import asyncio
import gc
import json
import random
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi_sse import (
    Broker,
    BrokerError,
    EventSourceResponse,
    Request,
    Run,
    ServerSentEvent,
    SSEMiddleware,
    StreamClosedError,
    StreamRegistry,
    create_app,
)
from asgi_sse.testing import OpenStream, open_stream

pytestmark = pytest.mark.anyio


async def words(count: int = 5, pause: float = 1.0) -> AsyncIterator[str]:
    for number in range(count):
        yield f"word {number}"
        await anyio.sleep(pause)


async def rest(stream: OpenStream) -> list[str]:
    events = [event async for event in stream]
    assert stream.complete
    return [str(event.data) for event in events]


def said(count: int, reason: str = "finished") -> list[str]:
    return [*(f"word {number}" for number in range(count)), f'{{"reason":"{reason}"}}']


def app_of(broker: Broker, **options: Any) -> Any:
    return create_app({"/runs/{channel}": broker.endpoint(runs=True), "/chat": broker.channel("chat")}, **options)


async def test_clients_come_late_leave_and_come_back() -> None:
    broker = Broker()
    app = app_of(broker)
    run = await broker.run("chat", words())
    async with open_stream(app, "/runs/chat") as stream:
        assert (await stream.receive()).data == "word 0"
        last = stream.last_event_id
    await anyio.sleep(2.5)  # nobody reads
    assert run.outcome is None
    async with open_stream(app, "/runs/chat", headers={"Last-Event-ID": last}) as stream:
        assert await rest(stream) == said(5)[1:]
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
                assert await rest(stream) == said(5)
        async with open_stream(app, path, headers={"Last-Event-ID": last}) as stream:
            assert stream.status == 204  # an EventSource stops
            assert await stream.read() == b""


async def test_a_run_that_an_endpoint_begins_and_answers_with() -> None:
    broker = Broker()

    async def chat(request: Request) -> Any:
        return await broker.run("chat", words())

    async with open_stream(create_app({"/chat": chat}), "/chat", method="POST") as stream:
        assert (await stream.receive()).data == "word 0"
        await stream.disconnect()
    run = broker.runs["chat"]
    assert await run.wait() == "finished"
    assert [event.data async for event in run.subscribe()] == said(5)


async def test_a_reader_that_is_no_response() -> None:
    broker = Broker()
    run = await broker.run("chat", words())
    seen = []
    async for event in run.subscribe(filter=lambda event: event.data in {"word 1", "word 3"}):
        seen.append(event)
        if len(seen) == 1:
            assert event.data == "word 1"
    assert [event.data for event in seen] == ["word 1", "word 3", '{"reason":"finished"}']  # its end in any case
    assert seen[-1].event == "end"
    assert [event async for event in run.subscribe(last_event_id=seen[-1].id)] == []


async def test_a_client_that_has_all_but_the_end_gets_the_end() -> None:
    broker = Broker()
    run = await broker.run("chat", words(3))
    events = [event async for event in run.subscribe()]
    async with open_stream(app_of(broker), "/runs/chat", headers={"Last-Event-ID": str(events[-2].id)}) as stream:
        assert await rest(stream) == ['{"reason":"finished"}']


async def test_an_iterable_runs_in_a_thread() -> None:
    broker = Broker()
    threads: list[threading.Thread] = []

    def blocking() -> Iterator[dict[str, str]]:
        threads.append(threading.current_thread())
        yield {"event": "part", "data": "1"}
        yield {"event": "part", "data": "2"}

    run = await broker.run("chat", blocking())
    assert [(event.event, event.data) async for event in run.subscribe()] == [
        ("part", "1"),
        ("part", "2"),
        ("end", '{"reason":"finished"}'),
    ]
    assert threads != [threading.current_thread()]
    run = await broker.run("list", ["a", "b"])
    assert await run.wait() == "finished"


async def test_a_source_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> AsyncIterator[str]:
        yield "word 0"
        await anyio.lowlevel.checkpoint()
        raise LookupError("no such model")

    broker = Broker()
    run = await broker.run("chat", fails())
    async with open_stream(app_of(broker), "/runs/chat") as stream:
        assert await rest(stream) == said(1, "failed")  # and nothing of what went wrong
    assert run.outcome == "failed"
    assert isinstance(run.error, LookupError)
    assert "the source of run chat raised" in caplog.text
    assert "no such model" in caplog.text


@pytest.mark.parametrize("catches", [False, True])
async def test_what_is_no_event_is_raised_at_the_yield(catches: bool, caplog: pytest.LogCaptureFixture) -> None:
    caught: list[str] = []

    async def source() -> AsyncIterator[Any]:
        yield "word 0"
        for bad in (b"data: x\n\n", {"data": "x", "id": 7}, object()):
            try:
                yield bad
            except ValueError as exc:
                caught.append(str(exc))
                if not catches:
                    raise
        await anyio.sleep(1)

    broker = Broker()
    run = await broker.run("chat", source())
    assert [event.data async for event in run.subscribe()] == said(1, "finished" if catches else "failed")
    assert len(caught) == (3 if catches else 1)
    assert "an event must be a ServerSentEvent" in caught[0]

    class Plain:
        def __aiter__(self) -> "Plain":
            return self

        async def __anext__(self) -> object:
            return object()

    run = await broker.run("chat", Plain())
    assert await run.wait() == "failed"


async def test_its_final_event_can_be_made() -> None:
    broker = Broker()

    def on_end(outcome: str, error: BaseException | None) -> dict[str, Any]:
        return {"event": "done", "data": f"{outcome} {error}"}

    run = await broker.run("chat", ["a"], on_end=on_end)
    assert [(event.event, event.data) async for event in run.subscribe()][-1] == ("done", "finished None")
    for broken in (lambda outcome, error: 1 / 0, lambda outcome, error: {"data": 1, "id": 2}):
        run = await broker.run("chat", ["a"], on_end=broken)
        assert [event.data async for event in run.subscribe()] == ["a", '{"reason":"finished"}']


async def test_a_source_that_catches_each_error_lets_others_go_on() -> None:
    async def source() -> AsyncIterator[Any]:
        while True:
            with suppress(ValueError):
                yield b"bytes"

    broker = Broker()
    run = await broker.run("chat", source())
    await anyio.lowlevel.checkpoint()
    run.cancel()
    assert await run.wait() == "cancelled"


async def test_a_source_that_meets_a_cancellation_has_failed() -> None:
    async def source() -> AsyncIterator[str]:
        yield "word 0"
        raise anyio.get_cancelled_exc_class() if sniffed() == "asyncio" else LookupError

    def sniffed() -> str:
        return anyio.get_cancelled_exc_class().__module__.partition(".")[0]

    run = await Broker().run("chat", source())
    assert await run.wait() == "failed"


@pytest.mark.parametrize("has_next", [True, False])
async def test_an_iterator_needs_no_more_than_its_next(has_next: bool) -> None:
    class Words:
        left = 2

        async def __anext__(self) -> str:
            self.left -= 1
            if self.left < 0:
                raise StopAsyncIteration
            return "word"

    class Source:
        def __aiter__(self) -> Any:
            return Words() if has_next else object()

    run = await Broker().run("chat", Source())
    assert await run.wait() == ("finished" if has_next else "failed")
    assert has_next or isinstance(run.error, AttributeError)


async def test_the_last_word_does_not_keep_the_source() -> None:
    class Source:
        def __aiter__(self) -> "Source":
            return self

        async def __anext__(self) -> str:
            raise StopAsyncIteration

    async def on_end(outcome: str, error: BaseException | None) -> str:
        await anyio.sleep(1)
        gc.collect()
        kept.append(reference())
        return "bye"

    kept: list[object] = []
    source = Source()
    reference = weakref.ref(source)
    run = await Broker().run("chat", source, on_end=on_end)
    del source
    assert await run.wait() == "finished"
    assert kept == [None]


def test_a_run_that_nobody_holds_is_collected_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    async def source() -> AsyncIterator[str]:
        yield "x"
        going_on.set()
        await asyncio.Event().wait()

    async def main() -> None:
        broker = Broker()
        await broker.run("chat", source(), on_end=lambda outcome, error: ends.append(outcome))
        await going_on.wait()
        del broker
        for _ in range(3):
            gc.collect()
            await asyncio.sleep(0)

    ends: list[str] = []
    going_on = asyncio.Event()
    asyncio.run(main())
    assert ends == []
    assert {record.name for record in caplog.records} <= {"asyncio"}


@pytest.mark.parametrize("error", [GeneratorExit, KeyboardInterrupt])
async def test_a_source_fails_by_whatever_it_raises(error: type[BaseException]) -> None:
    async def source() -> AsyncIterator[str]:
        yield "word 0"
        raise error

    run = await Broker().run("chat", source())
    assert [event.data async for event in run.subscribe()] == said(1, "failed")
    assert isinstance(run.error, error)


@pytest.mark.parametrize("source", ["publishes", "raises"])
async def test_a_source_is_begun_with_no_lock_held(source: str) -> None:
    broker = Broker()

    class Source:
        def __aiter__(self) -> AsyncIterator[str]:
            if source == "raises":
                raise LookupError
            broker.publish_nowait("other", "x")
            return words()

    if source == "raises":
        with pytest.raises(LookupError):
            await broker.run("chat", Source())
        assert len(broker.runs) == 0
    else:
        assert await (await broker.run("chat", Source())).wait() == "finished"


async def test_on_end_may_be_async_and_a_run_takes_no_snapshot() -> None:
    async def on_end(outcome: str, error: BaseException | None) -> str:
        await anyio.sleep(1)
        return f"it has {outcome}"

    run = await Broker().run("chat", ["a"], on_end=on_end)
    assert [event.data async for event in run.subscribe()] == ["a", "it has finished"]
    run = await Broker().run("chat", ["a"], on_end=lambda outcome, error: anyio.sleep(10_000))
    assert [event.data async for event in run.subscribe()] == ["a", '{"reason":"finished"}']
    with pytest.raises(TypeError, match="leave the snapshot out"):
        run.subscribe(snapshot=lambda: "x")


async def test_the_stream_of_a_run_that_was_forgotten_ends() -> None:
    broker, registry = Broker(), StreamRegistry()
    run = await broker.run("chat", ["a"], ttl=1)
    await run.wait()
    await anyio.sleep(2)
    async with open_stream(EventSourceResponse(run.subscribe(), registry=registry)) as stream:
        assert [event.event async for event in stream] == ["reset"]
        assert stream.complete


async def test_a_wait_that_is_given_up_leaves_nothing_behind() -> None:
    run = await Broker().run("chat", words())
    for _ in range(10):
        with anyio.move_on_after(0.01):
            await run.wait()
    assert run._waiters == []
    assert await run.wait() == "finished"


@pytest.mark.parametrize("waits", ["for long", "at a yield", "not yet"])
async def test_cancel(waits: str) -> None:
    cleaned: list[str] = []

    async def source() -> AsyncIterator[str]:
        try:
            yield "word 0"
            if waits == "for long":
                await anyio.sleep(3600)
            while True:
                yield "x" * 1000
        finally:
            await anyio.sleep(1)
            cleaned.append("up")

    broker = Broker(history=5)
    run = await broker.run("chat", source())
    if waits != "not yet":
        await anyio.sleep(0.1) if waits == "for long" else await anyio.lowlevel.checkpoint()
    run.cancel()
    run.cancel()
    assert await run.wait() == "cancelled"
    if waits != "not yet":  # else it may not have begun
        assert cleaned == ["up"]
    events = [event async for event in run.subscribe()]
    assert events[-1].data == '{"reason":"cancelled"}'
    run.cancel()
    assert await run.wait() == "cancelled"


async def test_a_source_that_swallows_its_cancellation(caplog: pytest.LogCaptureFixture) -> None:
    async def swallows() -> AsyncIterator[str]:
        while True:
            try:
                await anyio.sleep(3600)
            except anyio.get_cancelled_exc_class():
                yield "no"

    broker = Broker()
    run = await broker.run("chat", swallows())
    await anyio.sleep(1)
    run.cancel()
    assert await run.wait() == "cancelled"
    assert [event.data async for event in run.subscribe()] == ['{"reason":"cancelled"}']


async def test_a_source_that_does_not_come_to_its_end(caplog: pytest.LogCaptureFixture) -> None:
    released = anyio.Event()

    async def source() -> AsyncIterator[str]:
        try:
            yield "word 0"
            await anyio.sleep(3600)
        finally:
            with anyio.CancelScope(shield=True):
                await released.wait()

    broker = Broker()
    run = await broker.run("chat", source())
    await anyio.sleep(1)
    began = anyio.current_time()
    run.cancel()
    assert await run.wait() == "cancelled"
    assert anyio.current_time() - began == pytest.approx(10, abs=0.2)
    assert "was not cleaned up within 10 s" in caplog.text
    released.set()
    await anyio.sleep(1)
    assert [event.data async for event in run.subscribe()] == said(1, "cancelled")


async def test_a_run_that_is_too_long() -> None:
    broker = Broker()
    run = await broker.run("chat", words(100), max_lifetime=2.5)
    assert [event.data async for event in run.subscribe()] == said(3, "expired")


async def test_a_run_is_bounded_in_bytes_and_a_late_client_is_told() -> None:
    broker = Broker(history=2)  # which is not for runs
    run = await broker.run("chat", words(100, 0), max_bytes=10_000)
    await run.wait()
    events = [event async for event in run.subscribe()]
    assert (events[0].event, events[0].data) == ("reset", '{"reason":"expired"}')
    assert [event.data for event in events[1:]] == said(100)[-len(events) + 1 :]
    assert 10 < len(events) < 40
    async with open_stream(app_of(broker), "/runs/chat", headers={"Last-Event-ID": "old-1"}) as stream:
        seen = [event async for event in stream]
    assert seen[0].data == '{"reason":"epoch"}'
    assert [event.data for event in seen[1:]] == [event.data for event in events[1:]]


async def test_a_run_outlives_the_limits_of_other_channels() -> None:
    broker = Broker(history=1, max_channels=1, max_age=1)
    run = await broker.run("chat", words(3))
    for number in range(20):
        await broker.publish(f"other.{number}", "x")
        await anyio.sleep(0.5)
    assert [event.data async for event in run.subscribe()] == said(3)


async def test_a_run_is_kept_for_its_time() -> None:
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
    events = [event async for event in run.subscribe()]  # of who has kept it
    assert [event.event for event in events] == ["reset"]
    del run, events
    await anyio.sleep(11)
    gc.collect()
    assert reference() is None


async def test_a_name_can_be_used_again() -> None:
    broker = Broker()
    app = app_of(broker)
    first = await broker.run("chat", words(2))
    with pytest.raises(BrokerError, match="run chat goes on: read it by"):
        await broker.run("chat", words(2))
    events = [event async for event in first.subscribe()]
    second = await broker.run("chat", words(3))
    assert broker.runs["chat"] is second
    async with open_stream(app, "/runs/chat") as stream:
        assert await rest(stream) == said(3)
    # Who has missed the end of the first one gets that, and the second one.
    async with open_stream(app, "/runs/chat", headers={"Last-Event-ID": str(events[1].id)}) as stream:
        assert await rest(stream) == ['{"reason":"finished"}', *said(3)]
    assert [event.data async for event in first.subscribe()] == said(2)


async def test_a_limit_on_runs() -> None:
    broker = Broker(max_runs=2)
    runs = [await broker.run(f"chat/{number}", words(2)) for number in range(2)]
    with pytest.raises(BrokerError, match=r"2 runs go on, the most there may be \(max_runs\)"):
        await broker.run("chat/2", words(2))
    for run in runs:
        await run.wait()
    for number in range(2, 5):
        await (await broker.run(f"chat/{number}", words(2))).wait()
    assert list(broker.runs) == ["chat/3", "chat/4"]  # of those that have ended, as many


async def test_runs_do_not_make_other_channels_look_incomplete() -> None:
    broker = Broker()
    first = await broker.publish("orders.1", "x")
    for number in range(5):
        await (await broker.run(f"run.{number}", ["a"], ttl=0)).wait()
    await anyio.sleep(0.1)
    assert len(broker.runs) == 0
    async with broker.subscribe("orders.*", last_event_id=first) as subscription:
        await broker.publish("orders.2", "y")
        assert (await subscription.__anext__()).data == "y"


async def test_a_stream_of_several_channels_goes_on_behind_the_end_of_a_run() -> None:
    broker = Broker()
    async with open_stream(EventSourceResponse(broker.subscribe("chat", "news"))) as stream:
        await (await broker.run("chat", words(1))).wait()  # no list: virtual time does not wait for its thread
        await broker.publish("news", "b")
        assert [(await stream.receive()).data for _ in range(3)] == [*said(1), "b"]


async def test_a_drain_gives_a_run_time_to_end() -> None:
    broker, registry = Broker(), StreamRegistry(drain_timeout=10)
    await broker.run("chat", words(5))
    async with open_stream(app_of(broker, registry=registry), "/runs/chat") as stream:
        assert (await stream.receive()).data == "word 0"
        registry.begin_drain()
        assert await rest(stream) == said(5)[1:]
        assert 1000 <= (stream.retry or 0) <= 5000


async def test_a_drain_ends_the_stream_of_a_run_that_goes_on() -> None:
    broker, registry = Broker(), StreamRegistry(drain_timeout=3)
    run = await broker.run("chat", words(20))
    async with open_stream(app_of(broker, registry=registry), "/runs/chat") as stream:
        report = await registry.drain()
        seen = await rest(stream)
        assert seen == said(20)[: len(seen)]
        assert 3 <= len(seen) <= 5
    assert report.abandoned == 0
    assert run.outcome is None  # another server of this process may have clients of it
    run.cancel()
    await run.wait()


async def test_runs_have_a_grace_when_the_broker_is_closed() -> None:
    async with Broker(run_grace=3.5) as broker:
        short = await broker.run("short", words(3))
        long = await broker.run("long", words(300))
        began = anyio.current_time()
    assert anyio.current_time() - began == pytest.approx(3.5, abs=0.1)
    assert (short.outcome, long.outcome) == ("finished", "drained")
    assert [event.data async for event in long.subscribe()] == said(4, "drained")


@pytest.mark.parametrize(("grace", "words_seen"), [(2.5, 4), (100, 13)])
async def test_a_drain_ends_the_runs_of_the_broker_before_their_streams(grace: float, words_seen: int) -> None:
    broker, registry = Broker(run_grace=grace), StreamRegistry(drain_timeout=10)
    run = await broker.run("chat", words(100, 0.7))
    app = create_app({"/chat": broker.channel("chat")}, registry=registry, broker=broker)
    async with open_stream(app, "/chat") as stream:
        registry.begin_drain()
        registry.begin_drain()
        assert await rest(stream) == said(words_seen, "drained")
    assert run.outcome == "drained"


async def test_a_drain_that_was_a_false_alarm_is_followed_by_another() -> None:
    broker = Broker(run_grace=1)
    for _ in range(2):
        registry = StreamRegistry()
        app = create_app({"/chat": broker.channel("chat")}, registry=registry, broker=broker)
        await broker.run("chat", words(100, 0.3))
        async with open_stream(app, "/chat") as stream:
            registry.begin_drain()
            assert (await rest(stream))[-1] == '{"reason":"drained"}'


async def test_who_reads_a_run_reads_it_to_its_end_when_the_broker_is_closed() -> None:
    async with anyio.create_task_group() as tasks, Broker(run_grace=20) as broker:
        run = await broker.run("chat", words(5))
        seen: list[Any] = []

        async def read() -> None:
            seen.extend([event.data async for event in run.subscribe()])

        tasks.start_soon(read)
        await anyio.sleep(0.5)
    assert seen == said(5)


async def test_of_two_servers_one_may_be_followed_by_another() -> None:
    async with Broker(run_grace=0) as broker:
        run = await broker.run("chat", words(5))
        for name in ("one", "other"):
            await broker.open(name)
            broker.begin_close(10, name)
            broker.begin_close(10, "who has it not open")
            await broker.close(name)
        await anyio.sleep(1)
        assert run.outcome is None
    assert run.outcome == "drained"


async def test_no_run_begins_when_the_broker_is_closed() -> None:
    async with Broker() as broker:
        pass
    with pytest.raises(BrokerError, match="the broker is closed"):
        await broker.run("chat", words())
    async with broker:
        await (await broker.run("chat", words())).wait()


async def test_a_broker_that_another_server_has_open_is_not_ended() -> None:
    broker, registry = Broker(run_grace=0), StreamRegistry()
    create_app({}, registry=registry, broker=broker)
    async with broker:
        async with broker:
            run = await broker.run("chat", words(5))
            registry.begin_drain()
        await anyio.sleep(2)
        assert run.outcome is None
    assert run.outcome == "drained"


async def test_a_broker_that_is_closed_with_the_app() -> None:
    broker = Broker(run_grace=1)
    app = create_app({"/chat": broker.channel("chat")}, broker=broker)
    messages: list[dict[str, Any]] = []
    to_app, from_server = anyio.create_memory_object_stream[dict[str, Any]](2)

    async def send(message: Any) -> None:
        messages.append(message)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app, {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, from_server.receive, send)
        await to_app.send({"type": "lifespan.startup"})
        run = await broker.run("chat", words(100))
        await anyio.sleep(2)
        await to_app.send({"type": "lifespan.shutdown"})
    assert [message["type"] for message in messages] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert run.outcome == "drained"
    to_app.close()
    from_server.close()


async def test_a_broker_that_cannot_be_opened_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(self: Broker, by: object) -> None:
        raise BrokerError("nobody answers")

    monkeypatch.setattr(Broker, "open", fails)
    for tells_itself in (False, True):

        async def app(scope: Any, receive: Any, send: Any, tells_itself: bool = tells_itself) -> None:
            if not tells_itself:
                raise RuntimeError("no lifespan")
            try:
                await receive()
            except Exception:
                await send({"type": "lifespan.startup.failed", "message": "a traceback"})
                raise

        messages: list[Any] = []

        async def receive() -> Any:
            return {"type": "lifespan.startup"}

        async def send(message: Any, messages: list[Any] = messages) -> None:
            messages.append(message)

        with pytest.raises(BrokerError):
            await SSEMiddleware(app, broker=Broker())({"type": "lifespan"}, receive, send)
        assert messages == [{"type": "lifespan.startup.failed", "message": "BrokerError: nobody answers"}]


async def test_a_start_that_fails_leaves_no_broker_open() -> None:
    broker = Broker()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await broker.run("chat", words(100))
        raise LookupError

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        pytest.fail("there is nothing to say")

    with pytest.raises(LookupError):
        await SSEMiddleware(app, broker=broker)({"type": "lifespan"}, receive, send)
    assert broker.runs["chat"].outcome == "drained"


@pytest.mark.real_time
async def test_a_run_can_be_cancelled_and_waited_for_from_elsewhere() -> None:
    broker = Broker()
    run = await broker.run("chat", words(1000, 0.01))
    outcomes: list[str] = []

    async def elsewhere() -> None:
        outcomes.append(await run.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, anyio.run, elsewhere)
        await anyio.sleep(0.2)
        await anyio.to_thread.run_sync(run.cancel)
    assert outcomes == ["cancelled"]


def test_a_run_whose_event_loop_was_closed_has_ended() -> None:
    broker = Broker()
    runs: list[Run] = []

    async def begin() -> None:
        runs.append(await broker.run("chat", words(1000)))
        await anyio.lowlevel.checkpoint()

    anyio.run(begin)
    runs[0].cancel()
    assert runs[0].outcome == "cancelled"


async def test_bad_arguments() -> None:
    broker = Broker()
    with pytest.raises(TypeError, match="the function words itself; call it"):
        await broker.run("chat", words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channel 'a b'"):
        await broker.run("a b", words())
    for name in ("ttl", "max_lifetime", "max_bytes"):
        with pytest.raises(ValueError, match=rf"{name} must be (at least|more than) 0( or None)?, got -1"):
            await broker.run("chat", ["a"], **{name: -1})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=rf"{name} must be a number( or None)?, got '1'"):
            await broker.run("chat", ["a"], **{name: "1"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on_end=5 is not callable"):
        await broker.run("chat", ["a"], on_end=5)  # type: ignore[arg-type]
    for name in ("max_runs", "run_grace"):
        with pytest.raises(ValueError, match=rf"{name} must be (at least|more than) 0, got -1"):
            Broker(**{name: -1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="broker='redis://' is none; give a Broker"):
        create_app({}, broker="redis://")
    assert len(broker.runs) == 0
    assert json.loads(str(ServerSentEvent({"reason": "x"}).data)) == {"reason": "x"}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
async def test_any_coming_and_going(seed: int) -> None:
    """Every client has every event of the run once and in order in the end, wherever it was cut."""
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
                # What the decoder was fed of one message counts as seen, with its id.
                while stream._events:
                    seen.append(str(stream._events.popleft().data))
                last = stream.last_event_id or last
        assert status == 204
        assert seen == said(events)

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(client)
            await anyio.lowlevel.checkpoint()
    assert run.outcome == "finished"
    assert broker.subscribers("chat") == 0
