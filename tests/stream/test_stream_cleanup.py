"""`EventSourceResponse`: the clean-up of a source, and what is freed afterwards."""

import asyncio
import contextvars
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from stream_sources import OPENING, forever

from asgi_sse import (
    EventSourceResponse,
    ServerSentEvent,
    StreamRegistry,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="no request")


async def test_long_clean_up_is_forced_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    log = []

    async def source() -> AsyncIterator[str]:
        try:
            yield "x"
            await anyio.sleep_forever()
        finally:
            log.append("begins")
            await anyio.sleep(60)
            log.append("ends")

    async with open_stream(EventSourceResponse(source(), cleanup_timeout=3)) as stream:
        await stream.receive()
        began = anyio.current_time()
        await stream.disconnect()
        assert 3 <= anyio.current_time() - began < 3.2
    assert log == ["begins"]
    assert "not cleaned up within 3 s (cleanup_timeout) and ended when it was cancelled again" in caplog.text


async def test_each_stream_has_its_own_context() -> None:
    """Its source, its sends and its pings see the variables of its request, and no other's."""
    seen: dict[str, set[str]] = {"a": set(), "b": set()}

    def app_for(name: str) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def sending(message: Any) -> None:
                seen[name].add(f"send {variable.get()}")
                await send(message)

            async def source() -> AsyncIterator[str]:
                seen[name].add(f"source {variable.get()}")
                yield "x"
                await anyio.sleep_forever()

            def factory() -> ServerSentEvent:
                seen[name].add(f"ping {variable.get()}")
                return ServerSentEvent(comment="ping")

            variable.set(name)
            await EventSourceResponse(source(), ping=1, ping_message_factory=factory)(scope, receive, sending)

        return app

    async with open_stream(app_for("a")) as a, open_stream(app_for("b")) as b:
        for stream in (a, b):
            await stream.read()
            await stream.read(timeout=5)
    assert seen == {name: {f"send {name}", f"source {name}", f"ping {name}"} for name in "ab"}


async def test_source_woken_in_its_last_turn_is_cancelled_at_its_next_wait() -> None:
    woken, seen = anyio.Event(), []

    async def source() -> AsyncIterator[str]:
        try:
            yield "a"
            await woken.wait()
            await anyio.lowlevel.checkpoint()
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(1)
            seen.append("finally")

    registry = StreamRegistry()
    async with open_stream(EventSourceResponse(source(), registry=registry)) as stream:
        await stream.read()
        began = anyio.current_time()
        woken.set()
        next(iter(registry)).close("drained")
        while await stream.read():
            pass
        await stream.disconnect()
        assert anyio.current_time() - began < 2
        assert seen == ["finally"]


def test_closed_event_loop_is_freed() -> None:
    loops = []

    async def main() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))

        async def source() -> AsyncIterator[str]:
            yield "x"
            await asyncio.sleep(0.01)

        async with open_stream(EventSourceResponse(source(), ping=0.001)) as stream:
            await stream.receive()

    for _ in range(5):
        asyncio.run(main())
    gc.collect()
    assert [loop() for loop in loops] == [None] * 5


def test_stream_is_freed_without_the_garbage_collector() -> None:
    class Source:
        def __aiter__(self) -> "Source":
            return self

        async def __anext__(self) -> str:
            if self.left == 0:
                raise StopAsyncIteration
            self.left -= 1
            return "x"

        left = 3

    async def main() -> None:
        for _ in range(3):
            source = Source()
            alive.append(weakref.ref(source))
            # Without a client: that of tests is held by its event loop for a while.
            await asyncio.create_task(EventSourceResponse(source, registry=registry)(scope, receive, send))
            del source
        await asyncio.sleep(0)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        assert message["type"].startswith("http.response")

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "asgi": {"version": "3.0"}}
    alive: list[weakref.ref[Any]] = []
    registry = StreamRegistry()
    registry.when_ended(lambda stream: alive.append(weakref.ref(stream)))
    gc.disable()
    try:
        asyncio.run(main())
        assert [kept() for kept in alive] == [None] * 6
    finally:
        gc.enable()


def test_cancellation_by_the_server_shortens_the_clean_up() -> None:
    """A second Ctrl-C must not wait for ten seconds of clean-up; and `on_close` is called all the same."""
    log = []

    async def source() -> AsyncIterator[str]:
        try:
            yield "x"
        finally:
            log.append("begins")
            await asyncio.sleep(60)
            log.append("ends")

    async def main() -> None:
        left, cleaning = asyncio.Event(), asyncio.Event()

        async def receive() -> Any:
            await left.wait()
            cleaning.set()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):
                left.set()

        response = EventSourceResponse(source(), on_close=log.append)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        request = asyncio.create_task(response(scope, receive, send))
        await cleaning.wait()
        while not log:
            await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(request, 5)

    asyncio.run(main())
    assert log == ["begins", "disconnected"]


async def test_error_of_an_iterator_survives_an_interrupted_clean_up() -> None:
    class Source:
        def __aiter__(self) -> "Source":
            return self

        async def __anext__(self) -> str:
            await anyio.sleep(1)
            raise LookupError("its own")

        async def aclose(self) -> None:
            await anyio.sleep(5)

    with pytest.raises(LookupError, match="its own"):
        async with open_stream(EventSourceResponse(Source())) as stream:
            await stream.read()
            await anyio.sleep(2)
            await stream.disconnect()


async def test_error_of_an_abandoned_source_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    release = anyio.Event()

    async def source() -> AsyncIterator[str]:
        yield "x"
        while not release.is_set():
            with suppress(BaseException):
                await anyio.sleep(1)
        raise LookupError("late")

    registry = StreamRegistry()
    async with open_stream(EventSourceResponse(source(), cleanup_timeout=1, registry=registry)) as stream:
        await stream.receive()
        await stream.disconnect()
        release.set()
        while registry.statistics().abandoned:
            await anyio.sleep(0.1)
    assert "was abandoned" in caplog.text
    assert "LookupError: late" in caplog.text


async def test_source_that_awaits_another_library_fails_alone(anyio_backend_name: str) -> None:
    if anyio_backend_name != "trio":
        pytest.skip("it is asyncio's own wait that trio does not know")

    async def source() -> AsyncIterator[str]:
        yield "x"
        await asyncio.sleep(0)

    async with open_stream(EventSourceResponse(forever())) as other:
        with pytest.raises(TypeError, match="trio"):
            async with open_stream(EventSourceResponse(source())) as stream:
                await stream.receive()
                await stream.receive()
        assert await other.read() == OPENING
