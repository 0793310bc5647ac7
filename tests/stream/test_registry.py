"""`StreamRegistry`: the running streams, their statistics, observers and drains."""

import logging
import math
import re
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from asgi_sse import DrainReport, EventDecoder, EventSourceResponse, Request, StreamRegistry, create_app
from asgi_sse.runtime.deadlines import current_deadlines
from asgi_sse.stream.counters import StreamCounters
from asgi_sse.stream.observer import Observer
from asgi_sse.stream.registry import default_registry
from asgi_sse.stream.stream import Stream
from asgi_sse.testing import open_stream, running

pytestmark = pytest.mark.anyio


async def idle() -> AsyncIterator[str]:
    yield "first"
    await anyio.sleep_forever()


async def watches_draining(request: Request) -> AsyncIterator[str]:
    yield "first"
    await request.draining.wait()
    assert request.draining
    await anyio.sleep(2)
    yield "last event"


async def ignores_its_grace(request: Request) -> AsyncIterator[str]:
    assert not request.draining.is_set()
    assert not request.draining
    yield "first"
    await anyio.sleep_forever()


async def test_registry_shows_the_running_streams() -> None:
    registry = StreamRegistry()
    async with open_stream(EventSourceResponse(idle(), registry=registry), "/some/path") as stream:
        await stream.receive()
        assert len(registry) == 1
        (running,) = registry
        await anyio.sleep(5)
        assert (running.path, running.client, running.state) == ("/some/path", ("127.0.0.1", 50000), "open")
        assert (running.events, running.reason) == (1, None)
        assert running.age >= 5
        assert "/some/path open" in repr(running)
        statistics = registry.statistics()
        assert (statistics.open, statistics.opened, statistics.closed) == (1, 1, {})
        assert statistics.events == 1
        assert statistics.bytes == len(b": stream opened\nretry: 3000\n\ndata: first\n\n")
    assert list(registry) == []
    statistics = registry.statistics()
    assert (statistics.open, statistics.opened, statistics.closed) == (0, 1, {"disconnected": 1})
    assert statistics.events == 1


async def test_when_ended_calls_back_for_each_stream(caplog: pytest.LogCaptureFixture) -> None:
    registry = StreamRegistry()
    ended: list[str] = []

    def record(stream: Stream) -> None:
        ended.append(f"{stream.path} {stream.reason} {stream.events}")
        assert not len(registry)
        raise LookupError("of the callback")

    registry.when_ended(record)
    registry.when_ended(lambda stream: ended.append(stream.path))
    async with open_stream(EventSourceResponse(["a"], registry=registry), "/some/path") as stream:
        assert [event.data async for event in stream] == ["a"]
    assert ended == ["/some/path finished 1", "/some/path"]
    assert "of the callback" in caplog.text
    assert registry.statistics().drains == 0
    async with open_stream(EventSourceResponse(idle(), registry=registry), "/another") as stream:
        await registry.drain()
        await registry.drain()
    assert ended[2:] == ["/another drained 1", "/another"]
    assert registry.statistics().drains == 1


async def test_observer_hooks_run_in_order_around_the_last_message() -> None:
    registry = StreamRegistry()
    calls: list[str] = []
    request: ContextVar[str] = ContextVar("request")

    class Recorder(Observer):
        def begun(self, stream: Stream) -> None:
            calls.append(f"begun {request.get()} {stream.state}")

        def ending(self, stream: Stream) -> None:
            calls.append(f"ending {request.get()} {stream.reason} {stream.events} {stream.bytes_sent}")

        def ended(self, stream: Stream) -> None:
            calls.append(f"ended {request.get()} {stream.reason} {stream.state}")

    async def source() -> AsyncIterator[str]:
        calls.append("source")
        yield "x"
        if request.get() == "/fails":
            await anyio.sleep(1)
            raise LookupError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def send_and_record(message: Any) -> None:
            await send(message)
            if not message.get("more_body", True):
                calls.append("sent")

        request.set(scope["path"])
        response = EventSourceResponse(source(), registry=registry, opening_comment=False, retry=None)
        await response(scope, receive, send_and_record)

    remove = registry.observe(Recorder())
    async with open_stream(app, "/ends") as stream:
        assert [event.data async for event in stream] == ["x"]
    assert calls == [
        "begun /ends open", "source", "ending /ends finished 1 9", "sent", "ended /ends finished closed",
    ]  # fmt: skip
    calls.clear()
    with pytest.raises(LookupError):
        async with open_stream(app, "/fails") as stream:
            assert [event.data async for event in stream] == ["x"]
    assert calls == [
        "begun /fails open",
        "source",
        "ended /fails failed closed",
    ]  # a body that stays cut has no last message
    remove()
    remove_callback = registry.when_ended(lambda stream: calls.append(stream.path))
    remove_callback()
    async with open_stream(app, "/ends") as stream:
        assert [event.data async for event in stream] == ["x"]
    assert calls[3:] == ["source", "sent"]


async def test_observer_that_is_added_twice_is_removed_once_at_a_time() -> None:
    registry = StreamRegistry()
    ended: list[str] = []

    class Recorder(Observer):
        def ended(self, stream: Stream) -> None:
            ended.append(stream.path)

    observer = Recorder()
    remove_first, remove_second = registry.observe(observer), registry.observe(observer)
    for path, times in (("/two", 2), ("/one", 1), ("/none", 0)):
        async with open_stream(EventSourceResponse(["x"], registry=registry), path) as stream:
            assert [event.data async for event in stream] == ["x"]
        assert ended.count(path) == times
        remove_first()
        remove_first()  # a second call does nothing
        if path == "/one":
            remove_second()


async def test_statistics_count_durations() -> None:
    registry = StreamRegistry()

    async def lasting(seconds: float) -> AsyncIterator[str]:
        yield "x"
        await anyio.sleep(seconds)

    for seconds in (0.5, 2, 20, 30):
        async with open_stream(EventSourceResponse(lasting(seconds), registry=registry)) as stream:
            assert [event.data async for event in stream] == ["x"]
    statistics = registry.statistics()
    assert statistics.seconds == pytest.approx(52.5, abs=0.1)
    assert statistics.durations == (1, 1, 0, 2, 0, 0, 0, 0, 0, 0)
    assert not statistics.draining
    registry.begin_drain()
    assert registry.statistics().draining


def test_counts_of_several_threads_are_not_lost() -> None:
    """Servers in several threads may share a registry."""
    registry, counters = StreamRegistry(), StreamCounters()

    def count() -> None:
        for _ in range(20_000):
            registry.count_compressed("held")
            counters.count_closed("finished", 2.0, 3, 4)

    threads = [threading.Thread(target=count) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert registry.statistics().compressed == {"held": 80_000}
    assert (counters.closed, counters.events, counters.bytes) == ({"finished": 80_000}, 240_000, 320_000)
    assert (counters.seconds, counters.durations[1]) == (160_000, 80_000)


async def test_statistics_show_the_slowest_client() -> None:
    registry = StreamRegistry()

    async def fast() -> AsyncIterator[str]:
        while True:
            yield "x" * 10_000

    async with open_stream(EventSourceResponse(fast(), registry=registry), capacity=1):
        await anyio.sleep(5)
        assert 4 <= registry.statistics().longest_wait <= 5


async def test_drain_completes_each_body_with_its_own_reconnection_time() -> None:
    registry = StreamRegistry(drain_retry=(1000, 5000))
    reasons: list[str] = []
    retries = set()
    async with anyio.create_task_group() as tasks:

        async def client() -> None:
            response = EventSourceResponse(idle(), registry=registry, on_close=reasons.append)
            async with open_stream(response) as stream:
                assert [event.data async for event in stream] == ["first"]
                assert stream.complete
                retries.add(stream.retry)

        for _ in range(50):
            tasks.start_soon(client)
        while registry.statistics().events < 50:
            await anyio.sleep(0.01)
        report = await registry.drain()
    assert report == DrainReport(finished=0, closed=50, cancelled=0, abandoned=0, seconds=report.seconds)
    assert report.seconds < 1
    assert reasons == ["drained"] * 50
    assert all(retry is not None and 1000 <= retry <= 5000 for retry in retries)
    assert len(retries) > 10


async def test_events_yielded_before_a_drain_are_sent() -> None:
    async def burst() -> AsyncIterator[int]:
        for i in range(1000):
            yield i
        await anyio.sleep_forever()

    registry = StreamRegistry()
    async with open_stream(EventSourceResponse(burst(), registry=registry), capacity=1) as stream:
        while registry.statistics().events < 200:
            await anyio.sleep(0.01)
        (running,) = registry
        registry.begin_drain()
        received = [event.data async for event in stream]
        assert received == [str(i) for i in range(running.events)]
        assert stream.complete


async def test_endpoint_that_watches_draining_has_the_grace_period() -> None:
    registry = StreamRegistry(drain_retry=(1234, 1234))
    app = create_app(
        {"/watches": watches_draining, "/ignores": ignores_its_grace, "/idle": idle_endpoint}, registry=registry
    )
    async with (
        open_stream(app, "/watches") as watching,
        open_stream(app, "/ignores") as ignoring,
        open_stream(app, "/idle") as other,
    ):
        for stream in (watching, ignoring, other):
            assert (await stream.receive()).data == "first"
        report = await app.registry.drain()
        assert (report.finished, report.closed, report.cancelled, report.abandoned) == (1, 1, 1, 0)
        assert 10 <= report.seconds <= 10.1
        assert [event.data async for event in watching] == ["last event"]
        assert watching.retry == 1234
        assert watching.complete
        assert [event.data async for event in ignoring] == []
        assert ignoring.complete


def idle_endpoint() -> AsyncIterator[str]:
    return idle()


async def test_each_task_that_waits_for_draining_learns_of_it() -> None:
    told: list[int] = []

    async def endpoint(request: Request) -> AsyncIterator[str]:
        async def wait(number: int) -> None:
            await request.draining.wait()
            told.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(wait, number)
            yield "waits"
        yield "last event"

    registry = StreamRegistry()
    async with open_stream(create_app({"/": endpoint}, registry=registry)) as stream:
        await stream.expect("waits")
        registry.begin_drain()
        await stream.expect("last event")
    assert sorted(told) == [0, 1, 2]


async def test_drains_of_the_same_streams_count_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asgi_sse")
    registry = StreamRegistry()
    reports = []

    async def drain() -> None:
        reports.append(await registry.drain())

    app = create_app({"/": watches_draining}, registry=registry)
    async with open_stream(app) as stream, anyio.create_task_group() as tasks:
        await stream.expect("first")
        tasks.start_soon(drain)
        tasks.start_soon(drain)
        await stream.expect("last event", timeout=5)
    assert [report.finished for report in reports] == [1, 1]
    assert registry.statistics().drains == 1
    assert len([record for record in caplog.records if record.getMessage().startswith("drained 1 stream")]) == 1


async def test_drain_does_not_wait_for_streams_of_another_server(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asgi_sse")
    registry = StreamRegistry()
    app = create_app({"/idle": idle_endpoint, "/watches": watches_draining}, registry=registry)
    async with (
        running(app) as one,
        running(app) as other,
        open_stream(one, "/watches") as ending,
        open_stream(other, "/idle") as leaving,
        open_stream(other, "/idle") as staying,
        anyio.create_task_group() as tasks,
    ):
        for stream in (ending, leaving, staying):
            await stream.expect("first")
        tasks.start_soon(one.stop)
        await anyio.wait_all_tasks_blocked()
        await leaving.disconnect()
        assert registry.statistics().drains == 0
        await ending.expect("last event", timeout=5)
        with pytest.raises(TimeoutError):
            await staying.receive()
    drained = [record.getMessage() for record in caplog.records if record.getMessage().startswith("drained 1 stream")]
    assert "DrainReport(finished=1, closed=0, cancelled=0, abandoned=0" in drained[0]


async def test_client_that_does_not_read_is_cut_at_the_deadline() -> None:
    registry = StreamRegistry()

    async def fast() -> AsyncIterator[str]:
        while True:
            yield "x" * 10_000

    async with open_stream(EventSourceResponse(fast(), registry=registry), capacity=1) as stream:
        await anyio.sleep(1)
        report = await registry.drain(timeout=3)
        assert (report.cancelled, report.abandoned) == (1, 0)
        assert 3 <= report.seconds <= 4.1
    assert not stream.complete


async def test_source_that_ignores_its_cancellation_is_abandoned() -> None:
    release = anyio.Event()

    async def stubborn() -> AsyncIterator[str]:
        yield "first"
        while not release.is_set():
            with suppress(BaseException):
                await anyio.sleep(1)

    registry = StreamRegistry()
    async with open_stream(EventSourceResponse(stubborn(), registry=registry, cleanup_timeout=2)) as stream:
        await stream.receive()
        began = anyio.current_time()
        await stream.disconnect()
        assert 2 <= anyio.current_time() - began <= 2.2
        assert registry.statistics().abandoned == 1
        release.set()
        while registry.statistics().abandoned:
            await anyio.sleep(0.1)


async def test_new_stream_during_a_drain_ends_with_a_reconnection_time() -> None:
    registry = StreamRegistry(drain_retry=(1500, 1500))
    registry.begin_drain()
    assert registry.draining
    started = []

    async def source() -> AsyncIterator[str]:
        started.append(True)
        yield "x"

    async with open_stream(EventSourceResponse(source(), registry=registry)) as stream:
        assert stream.status == 200
        assert await stream.read() == b"retry: 1500\n\n"
        assert stream.complete
    assert not started


async def test_stream_drained_in_its_first_step_is_opened_at_once() -> None:
    """The response start does not wait for the deadline."""

    async def waits_for_draining(request: Request) -> AsyncIterator[str]:
        assert not request.draining
        (running,) = app.registry
        running.drain(5, anyio.current_time() + 10)
        await request.draining.wait()
        await anyio.sleep(1)
        yield "last event"

    app = create_app({"/": waits_for_draining}, open_timeout=0)
    began = anyio.current_time()
    async with open_stream(app) as stream:
        assert anyio.current_time() - began < 0.5
        assert (await stream.receive(timeout=2)).data == "last event"


async def test_later_drain_keeps_the_earlier_deadline() -> None:
    registry = StreamRegistry(drain_timeout=2)
    app = create_app({"/": ignores_its_grace}, registry=registry)
    async with open_stream(app) as stream:
        await stream.receive()
        registry.begin_drain()
        await anyio.sleep(1)
        report = await registry.drain(timeout=60)
        assert 0.9 <= report.seconds <= 1.1
        assert report.cancelled == 1


async def test_stream_that_fails_while_draining_counts_as_finished() -> None:
    async def fails(request: Request) -> AsyncIterator[str]:
        yield "first"
        await request.draining.wait()
        raise LookupError("last event")

    app = create_app({"/": fails})
    with pytest.raises(LookupError, match="last event"):
        async with open_stream(app) as stream:
            await stream.receive()
            report = await app.registry.drain()
            assert (report.finished, report.closed) == (1, 0)
            await stream.receive()


async def test_drain_inserts_nothing_into_an_incomplete_event() -> None:
    async def half() -> AsyncIterator[bytes]:
        yield b"data: whole\n\ndata: ha"
        await anyio.sleep_forever()

    registry = StreamRegistry()
    async with open_stream(EventSourceResponse(half(), registry=registry, opening_comment=False, retry=None)) as stream:
        assert await stream.read() == b"data: whole\n\ndata: ha"
        await registry.drain()
        assert await stream.read() == b""
        assert stream.complete


async def test_deadline_entries_of_finished_streams_are_bounded() -> None:
    registry = StreamRegistry()
    for _ in range(500):
        response = EventSourceResponse(idle(), registry=registry, ping=0, max_lifetime=86_400)
        async with open_stream(response) as stream:
            await stream.receive()
    assert len(current_deadlines()._entries) < 150


async def test_deadline_queue_rests_while_an_expired_stream_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = 0
    tick = Stream.tick

    def counting(stream: Stream) -> float:
        nonlocal ticks
        ticks += 1
        assert ticks < 20, "the deadline queue spins"
        return tick(stream)

    async def fast() -> AsyncIterator[str]:
        while True:
            yield "x" * 10_000

    monkeypatch.setattr(Stream, "tick", counting)
    response = EventSourceResponse(fast(), max_lifetime=1, send_timeout=None)
    async with open_stream(response, capacity=1) as stream:
        for _ in range(10):
            await anyio.sleep(1)
        while await stream.read():
            pass
        assert stream.complete
    assert ticks >= 1


async def test_drain_without_streams_can_be_repeated() -> None:
    registry = StreamRegistry()
    assert (await registry.drain()).closed == 0
    assert (await registry.drain()).closed == 0


async def test_end_drains_only_the_given_streams() -> None:
    """Their clients reconnect, and are accepted at once."""
    registry = StreamRegistry(drain_retry=(1500, 1500))
    app = create_app({"/idle": idle_endpoint, "/watches": watches_draining}, registry=registry)
    async with (
        open_stream(app, "/idle") as one,
        open_stream(app, "/idle") as other,
        open_stream(app, "/watches") as last,
    ):
        for stream in (one, other, last):
            await stream.receive()
        registry.end(list(registry)[:1])
        assert [event async for event in one] == []
        assert (one.complete, one.retry) == (True, 1500)
        with pytest.raises(TimeoutError):
            await other.receive()
        registry.end(registry)
        assert not registry.draining
        async with open_stream(app, "/idle") as back:
            assert (await back.receive()).data == "first"
            assert [event async for event in other] == []
            assert (other.complete, other.retry) == (True, 1500)
            assert [event.data async for event in last] == ["last event"]  # it had the grace period
            with pytest.raises(TimeoutError):
                await back.receive(timeout=60)  # a stream that began later continues


@pytest.mark.real_time
async def test_begin_drain_from_another_thread() -> None:
    registry = StreamRegistry()
    async with open_stream(EventSourceResponse(idle(), registry=registry)) as stream:
        await stream.receive()
        thread = threading.Thread(target=registry.begin_drain)
        thread.start()
        assert [event async for event in stream] == []
        assert stream.complete
        thread.join()


async def test_streams_without_a_registry_share_that_of_their_loop() -> None:
    async with open_stream(EventSourceResponse(idle())) as stream, open_stream(EventSourceResponse(idle())) as other:
        await stream.receive()
        await other.receive()
        assert len(default_registry()) == 2


async def test_deadline_queue_serves_many_streams() -> None:
    registry = StreamRegistry()
    pings = []
    async with anyio.create_task_group() as tasks:

        async def client(ping: float) -> None:
            response = EventSourceResponse(idle(), registry=registry, ping=ping)
            async with open_stream(response, capacity=1000) as stream:
                await stream.receive()
                decoder = EventDecoder()
                count = 0
                with anyio.move_on_after(100.5):
                    while True:
                        chunk = await stream.read(timeout=math.inf)
                        decoder.feed(chunk)
                        count += chunk.count(b": ping")
                pings.append((ping, count))

        for ping in (1, 2, 5, 10, 30, 60):
            tasks.start_soon(client, ping)
    assert sorted(pings) == [(1, 100), (2, 50), (5, 20), (10, 10), (30, 3), (60, 1)]


@pytest.mark.parametrize("timeout", [-1, math.nan])
def test_negative_drain_timeout_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match=f"drain_timeout must be at least 0, got {timeout}"):
        StreamRegistry(drain_timeout=timeout)


@pytest.mark.parametrize(
    "retry", [(5, 1), (-1, 5), (0.5, 5), (1, 5.0), 3000, None, "12", (1000,), (1, 2, 3), (False, 5), (0, True)]
)
def test_invalid_drain_retry_is_refused(retry: Any) -> None:
    message = f"drain_retry must be two whole numbers of milliseconds, the lower first, got {retry!r}; pass a range"
    with pytest.raises(ValueError, match=re.escape(message)):
        StreamRegistry(drain_retry=retry)


async def test_invalid_timeout_is_refused() -> None:
    with pytest.raises(TypeError, match="drain_timeout must be a number, got True"):
        StreamRegistry(drain_timeout=True)
    registry = StreamRegistry()
    with pytest.raises(TypeError, match="timeout must be a number or None, got '1'"):
        await registry.drain("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout must be at least 0 or None, got -1"):
        await registry.drain(-1)
    assert not registry.draining
