"""`EventSourceResponse`: how a stream ends, and what becomes of errors."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from stream_sources import OPENING, Reasons, body_of, forever, items

from asgi_sse import (
    EventSourceResponse,
    InvalidEventError,
    SendTimeoutError,
    ServerSentEvent,
    StreamRegistry,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


async def test_disconnect_ends_the_source() -> None:
    reasons, log = Reasons(), []

    async def source() -> AsyncIterator[str]:
        try:
            yield "a"
            await anyio.sleep_forever()
        finally:
            log.append("closing")
            await anyio.sleep(1)
            log.append("closed")

    registry = StreamRegistry()
    async with open_stream(EventSourceResponse(source(), on_close=reasons, registry=registry)) as stream:
        assert (await stream.receive()).data == "a"
        assert len(registry) == 1
        await stream.disconnect()
    assert log == ["closing", "closed"]
    assert reasons == ["disconnected"]
    assert len(registry) == 0
    assert registry.statistics().closed == {"disconnected": 1}


async def test_disconnect_ends_a_source_that_never_waits() -> None:
    closed = []

    async def source() -> AsyncIterator[str]:
        try:
            while True:
                yield "x"
        finally:
            closed.append(True)

    reasons = Reasons()
    async with open_stream(EventSourceResponse(source(), on_close=reasons)) as stream:
        await stream.receive()
        await stream.disconnect()
    assert closed == [True]
    assert reasons == ["disconnected"]


async def test_async_on_close_runs_after_the_clean_up() -> None:
    log = []

    async def source() -> AsyncIterator[str]:
        try:
            yield "a"
        finally:
            log.append("source closed")

    async def on_close(reason: str) -> None:
        await anyio.sleep(1)
        log.append(reason)

    await body_of(EventSourceResponse(source(), on_close=on_close))
    assert log == ["source closed", "finished"]


async def test_error_of_on_close_is_raised() -> None:
    def on_close(reason: str) -> None:
        raise LookupError(reason)

    with pytest.raises(LookupError, match="finished"):
        async with open_stream(EventSourceResponse(items("a"), on_close=on_close)) as stream:
            assert (await stream.receive()).data == "a"


async def test_max_lifetime_ends_the_stream() -> None:
    reasons = Reasons()
    async with open_stream(EventSourceResponse(forever(), max_lifetime=100, ping=0, on_close=reasons)) as stream:
        assert await stream.read() == OPENING
        began = anyio.current_time()
        assert await stream.read(timeout=1000) == b""
        assert 80 <= anyio.current_time() - began <= 100.1
        assert stream.complete
    assert reasons == ["expired"]


async def test_send_timeout_drops_a_client_that_does_not_read() -> None:
    closed = []

    async def source() -> AsyncIterator[str]:
        try:
            while True:
                yield "x" * 10_000
        finally:
            closed.append(anyio.current_time())

    reasons = Reasons()
    registry = StreamRegistry()
    response = EventSourceResponse(source(), send_timeout=7, on_close=reasons, registry=registry)
    began = anyio.current_time()
    with pytest.raises(SendTimeoutError, match="7 s"):
        async with open_stream(response, capacity=1):
            while registry.statistics().opened == 0 or len(registry):
                await anyio.sleep(0.5)
            assert 7 <= anyio.current_time() - began <= 8
    assert len(closed) == 1
    assert reasons == ["timed_out"]


async def test_slow_client_holds_its_source() -> None:
    """A source waits when its buffer is full; what the client has not taken stays bounded."""
    count = 0

    async def source() -> AsyncIterator[str]:
        nonlocal count
        while True:
            count += 1
            yield "x" * 1000

    async with open_stream(EventSourceResponse(source(), send_timeout=None), capacity=1) as stream:
        await anyio.sleep(10)
        blocked_at = count
        assert blocked_at * 1000 < 4 * 65_536
        await anyio.sleep(10)
        assert count == blocked_at
        for _ in range(10):
            assert len(await stream.read()) <= 65_536 + 1100
        await anyio.sleep(1)
        assert count > blocked_at


async def test_error_before_the_first_event_leaves_the_status_open() -> None:
    async def source() -> AsyncIterator[str]:
        raise LookupError("early")
        yield

    reasons = Reasons()
    with pytest.raises(LookupError, match="early"):
        async with open_stream(EventSourceResponse(source(), on_close=reasons)):
            pytest.fail("there should be no head")
    assert reasons == ["failed"]


async def test_open_timeout_holds_the_response_start_for_an_early_error() -> None:
    async def source() -> AsyncIterator[str]:
        await anyio.sleep(0.9)
        raise LookupError("early")
        yield

    with pytest.raises(LookupError, match="early"):
        async with open_stream(EventSourceResponse(source(), open_timeout=1)):
            pytest.fail("there should be no head")


async def test_response_starts_after_open_timeout() -> None:
    async with open_stream(EventSourceResponse(forever(), open_timeout=1)) as stream:
        assert 1 <= anyio.current_time()
        assert stream.status == 200
        assert await stream.read() == OPENING


async def test_late_error_cuts_the_body_after_the_last_event() -> None:
    async def source() -> AsyncIterator[str]:
        yield "a"
        yield "just before"
        raise LookupError("late")

    reasons = Reasons()
    async with open_stream(EventSourceResponse(source(), on_close=reasons)) as stream:
        assert [(await stream.receive()).data, (await stream.receive()).data] == ["a", "just before"]
        with pytest.raises(LookupError, match="late"):
            await stream.receive()
        assert not stream.complete
    assert reasons == ["failed"]


@pytest.mark.parametrize(
    ("on_error", "last"),
    [
        (lambda exc: ServerSentEvent(str(exc), event="error"), [("error", "late")]),
        (lambda exc: {"data": "dict"}, [("message", "dict")]),
        (lambda exc: None, []),
        (lambda exc: 1 / 0, []),
    ],
)
async def test_on_error_makes_the_last_event(on_error: Callable[[Exception], Any], last: list[tuple[str, str]]) -> None:
    async def source() -> AsyncIterator[str]:
        yield "a"
        raise LookupError("late")

    with pytest.raises(LookupError, match="late"):
        async with open_stream(EventSourceResponse(source(), on_error=on_error)) as stream:
            assert (await stream.receive()).data == "a"
            for event, data in last:
                received = await stream.receive()
                assert (received.event, received.data) == (event, data)
            await stream.receive()


async def test_invalid_item_is_raised_at_its_yield() -> None:
    """So the traceback names the line, and the source may go on."""
    seen = []

    async def source() -> AsyncIterator[Any]:
        try:
            yield {"dta": "x"}
        except InvalidEventError as exc:
            seen.append(str(exc))
        yield "fine"
        yield [1, 2]

    with pytest.raises(InvalidEventError, match=r"cannot encode \[1, 2\]"):
        async with open_stream(EventSourceResponse(source())) as stream:
            assert (await stream.receive()).data == "fine"
            await stream.receive()
    assert "unknown key 'dta'" in seen[0]


async def test_invalid_item_of_a_plain_iterator_fails_the_stream() -> None:
    send, receive = anyio.create_memory_object_stream[Any](1)
    async with send:
        await send.send(None)
        with pytest.raises(InvalidEventError, match="cannot encode None"):
            async with open_stream(EventSourceResponse(receive)):
                pass


async def test_send_that_raises_ends_only_its_stream() -> None:
    registry = StreamRegistry()

    def broken(error: Exception) -> Callable[..., Any]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def raising(message: Any) -> None:
                if message["type"] == "http.response.body":
                    raise error
                await send(message)

            await EventSourceResponse(forever(), on_close=reasons, registry=registry)(scope, receive, raising)

        return app

    reasons = Reasons()
    async with open_stream(EventSourceResponse(forever(), registry=registry)) as other:
        await other.read()
        async with open_stream(broken(OSError("gone"))) as stream:
            while len(registry) > 1:
                await anyio.sleep(0.1)
            assert stream.status == 200
        with pytest.raises(ValueError, match="wrong"):
            async with open_stream(broken(ValueError("wrong"))):
                while len(registry) > 1:
                    await anyio.sleep(0.1)
        assert reasons == ["disconnected", "failed"]
        assert await other.read(timeout=20) == b": ping\n\n"


@pytest.mark.parametrize(("text", "reason"), [("the handler is closed", "disconnected"), ("bug", "failed")])
async def test_closed_handler_of_uvloop_means_that_the_client_has_left(text: str, reason: str) -> None:
    reasons = Reasons()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def raising(message: Any) -> None:
            if message["type"] == "http.response.body":
                raise RuntimeError(text)
            await send(message)

        await EventSourceResponse(forever(), on_close=reasons)(scope, receive, raising)

    expected: AbstractContextManager[Any] = (
        nullcontext() if reason == "disconnected" else pytest.raises(RuntimeError, match=text)
    )
    with expected:
        async with open_stream(app) as stream:
            while not reasons:
                await anyio.sleep(0.1)
            assert stream.status == 200
    assert reasons == [reason]


async def test_error_that_the_clean_up_raises_again_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Source:
        error = LookupError("its own")

        def __aiter__(self) -> "Source":
            return self

        async def __anext__(self) -> str:
            raise self.error

        async def aclose(self) -> None:
            raise self.error

    with pytest.raises(LookupError, match="its own"):
        async with open_stream(EventSourceResponse(Source())):
            pass
    assert not caplog.records


@pytest.mark.parametrize("trouble", ["stuck", "gone", "cancelled"])
def test_stream_runs_on_a_bare_event_loop(trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    """Servers do not start their loops through anyio, whose functions then fail in callbacks where sniffio is."""
    reasons = Reasons()

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            if trouble == "gone":
                raise OSError("gone")
            await asyncio.sleep(0 if trouble == "cancelled" else 60)
            raise asyncio.CancelledError

    async def main() -> None:
        response = EventSourceResponse(forever(), send_timeout=0.05, on_close=reasons)
        await asyncio.wait_for(
            response({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send), 30
        )

    if trouble == "stuck":
        with pytest.raises(SendTimeoutError):
            asyncio.run(main())
    else:
        asyncio.run(main())
    assert reasons == ["timed_out" if trouble == "stuck" else "disconnected"]
    assert not caplog.records


async def test_aiter_that_returns_no_iterator_fails_the_stream() -> None:
    class Source:
        def __aiter__(self) -> Any:
            return object()

    with pytest.raises(AttributeError, match="__anext__"):
        async with open_stream(EventSourceResponse(Source())) as stream:
            await stream.read()
