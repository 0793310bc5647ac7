"""`EventSourceResponse` with sync sources, which run in threads."""

import contextvars
import threading
import time
from collections.abc import Iterator
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
