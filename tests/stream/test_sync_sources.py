"""`EventSourceResponse` with sync sources, which run in threads."""

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Iterator
from functools import partial
from logging.handlers import QueueHandler
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from stream_sources import body_of

from asgi_sse import (
    EventSourceResponse,
    SSEError,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


@pytest.mark.real_time
async def test_clean_up_of_a_sync_source_that_leaves_next_is_awaited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asgi_sse.stream.source._NEXT_TIMEOUT_S", 30)  # a slow machine takes longer than it has
    inside, seen = threading.Event(), []

    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
                inside.set()
                time.sleep(0.05)
        finally:
            time.sleep(0.2)
            seen.append("finally")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with open_stream(EventSourceResponse(source())) as stream:
            await stream.receive()
            await anyio.to_thread.run_sync(inside.wait)
            await stream.disconnect()
    assert seen == ["finally"]


@pytest.mark.real_time
async def test_sync_source_runs_in_one_thread_and_context() -> None:

    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    variable.set(5)
    seen: set[tuple[int, int]] = set()
    main = threading.get_ident()

    def source() -> Any:
        try:
            for i in range(1000):
                seen.add((threading.get_ident(), variable.get()))
                yield i
        finally:
            seen.add((threading.get_ident(), variable.get()))

    async with open_stream(EventSourceResponse(source())) as stream:
        assert [event.data async for event in stream] == [str(i) for i in range(1000)]
    ((thread, value),) = seen
    assert thread != main
    assert value == 5


@pytest.mark.real_time
async def test_sync_source_is_closed_in_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "asgi_sse.stream.source._NEXT_TIMEOUT_S", 30
    )  # it may be inside, for a moment that a slow machine prolongs
    closed = threading.Event()

    def source() -> Any:
        try:
            while True:
                yield "x"
        finally:
            closed.set()

    async with open_stream(EventSourceResponse(source())) as stream:
        await stream.receive()
        await stream.disconnect()
    assert closed.is_set()


@pytest.mark.real_time
async def test_blocked_sync_source_does_not_hold_the_disconnect() -> None:

    release, closed = threading.Event(), threading.Event()

    def source() -> Any:
        try:
            yield "x"
            release.wait(30)
            yield "y"
        finally:
            closed.set()

    async with open_stream(EventSourceResponse(source(), cleanup_timeout=20)) as stream:
        await stream.receive()
        with anyio.fail_after(15):
            await stream.disconnect()
    assert not closed.is_set()
    release.set()
    assert await anyio.to_thread.run_sync(closed.wait, 60)


@pytest.mark.real_time
async def test_threads_are_bounded_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_sse.stream.source._threads", threading.BoundedSemaphore(1))
    release = threading.Event()

    def source() -> Any:
        yield "x"
        release.wait(30)

    async with open_stream(EventSourceResponse(source())) as first:
        await first.receive()
        with pytest.raises(SSEError, match="sync sources must be at most"):
            async with open_stream(EventSourceResponse(source())):
                pass
        for needs_none in (["a", "b"], ("a", "b")):
            async with open_stream(EventSourceResponse(needs_none)) as stream:
                assert [event.data async for event in stream] == ["a", "b"]
        release.set()
        assert [event async for event in first] == []
    async with open_stream(EventSourceResponse(iter(["next"]))) as after:
        assert (await after.receive()).data == "next"


@pytest.mark.real_time
async def test_error_of_a_sync_source_is_raised() -> None:
    def late() -> Any:
        yield "a"
        raise LookupError("late")

    def early() -> Any:
        raise LookupError("early")
        yield

    with pytest.raises(LookupError, match="late"):
        async with open_stream(EventSourceResponse(late())) as stream:
            assert (await stream.receive()).data == "a"
            await stream.receive()
    with pytest.raises(LookupError, match="early"):
        async with open_stream(EventSourceResponse(early(), open_timeout=5)):
            pass
    assert (await body_of(EventSourceResponse(["a", "b"]))).endswith(b"data: a\n\ndata: b\n\n")


@pytest.mark.real_time
async def test_thread_that_cannot_start_is_reported_and_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        if thread.name == "asgi_sse source":
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    start_thread = threading.Thread.start
    monkeypatch.setattr("asgi_sse.stream.source._threads", threading.BoundedSemaphore(1))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(2):  # the second would find no place if the first kept it
            with pytest.raises(
                SSEError, match=r"cannot start another thread \(can't start new thread\); make the source"
            ):
                async with open_stream(EventSourceResponse(iter("a"))):
                    pass
    async with open_stream(EventSourceResponse(iter("a"))) as stream:
        assert (await stream.receive()).data == "a"


@pytest.mark.real_time
async def test_error_of_a_blocked_sync_source_is_logged_after_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asgi_sse.stream.source._NEXT_TIMEOUT_S", 0.01)
    inside, release = threading.Event(), threading.Event()
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()

    def source() -> Iterator[str]:
        yield "x"
        inside.set()
        release.wait(60)
        raise LookupError("too late")

    handler = QueueHandler(records)
    logger = logging.getLogger("asgi_sse.stream.source")
    logger.addHandler(handler)
    try:
        async with open_stream(EventSourceResponse(source())) as stream:
            await stream.receive()
            await anyio.to_thread.run_sync(inside.wait)
            await stream.disconnect()
        assert records.empty()
        release.set()
        record = await anyio.to_thread.run_sync(partial(records.get, timeout=60))
    finally:
        logger.removeHandler(handler)
    assert record.getMessage().startswith("a sync source raised after its stream had ended")
    assert "LookupError: too late" in record.getMessage()
