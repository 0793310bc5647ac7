"""`EventSourceResponse` as an ASGI app sees a client: what it sends, when, and why it ends."""

import asyncio
import contextvars
import gc
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_sse import (
    EventSourceResponse,
    HTTPError,
    InvalidEventError,
    SendTimeoutError,
    ServerSentEvent,
    SSEError,
    StreamClosedError,
    StreamRegistry,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio

OPENING = b": stream opened\nretry: 3000\n\n"


async def items(*values: Any) -> AsyncIterator[Any]:
    for value in values:
        yield value


async def forever() -> AsyncIterator[Any]:
    await anyio.sleep_forever()
    yield


class Reasons(list[str]):
    """Collects what `on_close` is told."""

    def __call__(self, reason: str) -> None:
        self.append(reason)


async def body_of(response: EventSourceResponse, **request: Any) -> bytes:
    async with open_stream(response, **request) as stream:
        body = b""
        while chunk := await stream.read(timeout=100_000):
            body += chunk
        assert stream.complete
    return body


async def test_head_and_opening() -> None:
    async with open_stream(EventSourceResponse(items("a"))) as stream:
        assert stream.status == 200
        assert stream.headers == {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store, no-transform",
            "x-accel-buffering": "no",
        }
        assert await stream.read() == OPENING + b"data: a\n\n"
        assert await stream.read() == b""
        assert stream.complete


async def test_items_of_every_kind() -> None:
    source = items(
        "text", 5, 1.5, ServerSentEvent("event", id=1), {"data": {"a": 1}, "event": "json"}, b"data: encoded\n\n",
        bytearray(b"data: array\n\n"), "", {"comment": "only"}, "two\nlines",
    )  # fmt: skip
    assert (await body_of(EventSourceResponse(source))).removeprefix(OPENING) == (
        b'data: text\n\ndata: 5\n\ndata: 1.5\n\nid: 1\ndata: event\n\nevent: json\ndata: {"a":1}\n\n'
        b"data: encoded\n\ndata: array\n\ndata: \n\n: only\n\ndata: two\ndata: lines\n\n"
    )  # fmt: skip


@pytest.mark.parametrize("sep", ["\n", "\r\n", "\r"])
async def test_separator_holds_for_all_that_is_sent(sep: str) -> None:
    body = await body_of(EventSourceResponse(items("a", {"data": "b\nc"}, ServerSentEvent("d")), sep=sep))
    expected = OPENING + b"data: a\n\ndata: b\ndata: c\n\ndata: d\n\n"
    assert body == expected.replace(b"\n", sep.encode())


async def test_no_opening_block() -> None:
    assert await body_of(EventSourceResponse(items("a"), retry=None, opening_comment=False)) == b"data: a\n\n"
    assert await body_of(EventSourceResponse(items("a"), retry=0, opening_comment=False)) == b"retry: 0\n\ndata: a\n\n"


async def test_an_empty_source_is_an_empty_stream() -> None:
    assert await body_of(EventSourceResponse(items())) == OPENING


async def test_other_sources() -> None:
    send, receive = anyio.create_memory_object_stream[str](2)
    async with send:
        await send.send("from a stream")
    assert (await body_of(EventSourceResponse(receive))).endswith(b"data: from a stream\n\n")
    with pytest.raises(anyio.ClosedResourceError):
        receive.receive_nowait()  # it was given away: the response has closed it

    class Iterable:
        def __aiter__(self) -> AsyncIterator[str]:
            return items("from an iterable")

    assert (await body_of(EventSourceResponse(Iterable()))).endswith(b"data: from an iterable\n\n")


async def test_headers_can_be_overridden_and_added() -> None:
    headers = {"Cache-Control": "public, max-age=29", "X-Two": "ü "}
    async with open_stream(EventSourceResponse(items(), headers=headers, status_code=203)) as stream:
        assert stream.status == 203
        assert stream.headers["cache-control"] == "public, max-age=29"
        assert stream.headers["x-two"] == "ü"
        assert stream.headers["x-accel-buffering"] == "no"


async def test_head_request_starts_no_source() -> None:
    started = []

    async def source() -> AsyncIterator[str]:
        started.append(True)
        yield "x"

    async with open_stream(EventSourceResponse(source()), method="HEAD") as stream:
        assert stream.status == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert await stream.read() == b""
        assert stream.complete
    assert not started


async def test_one_burst_is_one_message() -> None:
    """Coalescing: what a source yields without waiting leaves in one send."""
    async with open_stream(EventSourceResponse(items(*range(100)))) as stream:
        assert (await stream.read()).count(b"data:") == 100


async def test_pings_go_to_idle_streams_alone() -> None:
    async def source() -> AsyncIterator[str]:
        for _ in range(5):
            await anyio.sleep(9)
            yield "busy"
        await anyio.sleep(25)
        yield "idle"

    body = await body_of(EventSourceResponse(source(), ping=10))
    assert body == OPENING + b"data: busy\n\n" * 5 + b": ping\n\n" * 2 + b"data: idle\n\n"


@pytest.mark.parametrize("ping", [0, None])
async def test_ping_off(ping: float | None) -> None:
    async def source() -> AsyncIterator[str]:
        await anyio.sleep(86_400)
        yield "x"

    assert await body_of(EventSourceResponse(source(), ping=ping)) == OPENING + b"data: x\n\n"


async def test_ping_message_factory() -> None:
    count = iter(range(10))

    async def source() -> AsyncIterator[str]:
        await anyio.sleep(3.5)
        yield "x"

    response = EventSourceResponse(
        source(), ping=1, ping_message_factory=lambda: ServerSentEvent(comment=f"n {next(count)}"), sep="\r\n"
    )
    assert (await body_of(response)).endswith(b": n 0\r\n\r\n: n 1\r\n\r\n: n 2\r\n\r\ndata: x\r\n\r\n")


async def test_a_ping_message_factory_that_raises_ends_its_stream() -> None:
    def factory() -> ServerSentEvent:
        raise LookupError("no ping")

    reasons = Reasons()
    response = EventSourceResponse(forever(), ping=1, ping_message_factory=factory, on_close=reasons)
    with pytest.raises(LookupError, match="no ping"):
        async with open_stream(response) as stream:
            await stream.read()
            await stream.read(timeout=5)
    assert reasons == ["failed"]


async def test_no_ping_in_the_middle_of_an_event() -> None:
    async def source() -> AsyncIterator[bytes]:
        yield b"data: one"
        await anyio.sleep(35)
        yield b"\n\n"
        await anyio.sleep(15)
        yield b"data: two\r"
        await anyio.sleep(35)
        yield b"\n\r\n"

    body = await body_of(EventSourceResponse(source(), ping=10))
    assert body == OPENING + b"data: one\n\n: ping\n\ndata: two\r\n\r\n"


async def test_disconnect() -> None:
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


async def test_disconnect_reaches_a_source_that_never_waits() -> None:
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


async def test_on_close_may_be_async_and_comes_after_the_clean_up() -> None:
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


async def test_on_close_that_raises_is_not_silent() -> None:
    def on_close(reason: str) -> None:
        raise LookupError(reason)

    with pytest.raises(LookupError, match="finished"):
        async with open_stream(EventSourceResponse(items("a"), on_close=on_close)) as stream:
            assert (await stream.receive()).data == "a"


async def test_max_lifetime() -> None:
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


async def test_a_slow_client_holds_its_source() -> None:
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


async def test_one_large_event_is_not_split() -> None:
    async with open_stream(EventSourceResponse(items("a", "x" * 200_000, "b", "y" * 60_000, "z" * 60_000))) as stream:
        sizes = []
        while chunk := await stream.read():
            assert chunk.endswith(b"\n\n")
            sizes.append(len(chunk))
        assert max(sizes) == 200_000 + len(b"data: \n\n")


async def test_an_error_before_the_first_event_leaves_the_status_open() -> None:
    async def source() -> AsyncIterator[str]:
        raise LookupError("early")
        yield

    reasons = Reasons()
    with pytest.raises(LookupError, match="early"):
        async with open_stream(EventSourceResponse(source(), on_close=reasons)):
            pytest.fail("there should be no head")
    assert reasons == ["failed"]


async def test_open_timeout_holds_the_head_for_a_late_early_error() -> None:
    async def source() -> AsyncIterator[str]:
        await anyio.sleep(0.9)
        raise LookupError("early")
        yield

    with pytest.raises(LookupError, match="early"):
        async with open_stream(EventSourceResponse(source(), open_timeout=1)):
            pytest.fail("there should be no head")


async def test_open_timeout_ends() -> None:
    async with open_stream(EventSourceResponse(forever(), open_timeout=1)) as stream:
        assert 1 <= anyio.current_time()
        assert stream.status == 200
        assert await stream.read() == OPENING


async def test_a_late_error_cuts_the_body_after_the_last_event() -> None:
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
async def test_on_error(on_error: Callable[[Exception], Any], last: list[tuple[str, str]]) -> None:
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


async def test_a_bad_item_is_raised_at_its_yield() -> None:
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


async def test_a_bad_item_of_what_is_no_generator() -> None:
    send, receive = anyio.create_memory_object_stream[Any](1)
    async with send:
        await send.send(None)
        with pytest.raises(InvalidEventError, match="cannot encode None"):
            async with open_stream(EventSourceResponse(receive)):
                pass


async def test_json_dumps() -> None:
    response = EventSourceResponse(
        items({"data": {1, 2}}, {"data": "text"}, {"data": True}), json_dumps=lambda value: repr(value).encode()
    )
    assert (await body_of(response)).endswith(b"data: {1, 2}\n\ndata: text\n\ndata: True\n\n")


async def test_a_send_that_raises_ends_its_stream_alone() -> None:
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


@pytest.mark.parametrize("trouble", ["stuck", "gone", "cancelled"])
def test_it_works_on_a_bare_event_loop(trouble: str, caplog: pytest.LogCaptureFixture) -> None:
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


async def test_a_clean_up_that_takes_too_long_is_cancelled_and_told(caplog: pytest.LogCaptureFixture) -> None:
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


async def test_empty_items_do_not_stop_a_stream() -> None:
    large = b"data: " + b"x" * 70_000 + b"\n\n"
    body = await body_of(EventSourceResponse(items(b"", large, b"", b"", "end"), ping=0))
    assert body == OPENING + large + b"data: end\n\n"


async def test_a_source_of_nothing_but_empty_items_starves_nobody() -> None:
    async def source() -> AsyncIterator[bytes]:
        while True:
            yield b""

    async with open_stream(EventSourceResponse(source())) as stream:
        assert await stream.read() == OPENING
        await stream.disconnect()


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody's")


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


@pytest.mark.real_time
async def test_the_clean_up_of_a_synchronous_source_that_comes_out_of_next_is_waited_for(
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


async def test_a_source_that_is_woken_in_the_turn_of_its_end_is_cancelled_at_its_next_wait() -> None:
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


def test_an_event_loop_is_let_go_of() -> None:
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


async def test_what_iterates_by_what_is_no_iterator_fails() -> None:
    class Source:
        def __aiter__(self) -> Any:
            return object()

    with pytest.raises(AttributeError, match="__anext__"):
        async with open_stream(EventSourceResponse(Source())) as stream:
            await stream.read()


def test_a_stream_is_let_go_of_without_the_garbage_collector() -> None:
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


def test_a_cancellation_by_the_server_during_the_clean_up_shortens_it() -> None:
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


async def test_what_an_iterator_raised_is_not_lost_when_its_clean_up_is_interrupted() -> None:
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


async def test_what_a_source_raises_after_it_was_left_behind_is_logged(caplog: pytest.LogCaptureFixture) -> None:
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


async def test_a_source_that_awaits_for_another_library_fails_alone(anyio_backend_name: str) -> None:
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


async def test_two_sends_are_never_in_flight() -> None:
    in_flight = 0
    most = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def counting(message: Any) -> None:
            nonlocal in_flight, most
            in_flight += 1
            most = max(most, in_flight)
            await anyio.sleep(0.3)
            in_flight -= 1
            await send(message)

        async def source() -> AsyncIterator[int]:
            for i in range(50):
                yield i
                await anyio.sleep(0.1)

        await EventSourceResponse(source(), ping=0.1)(scope, receive, counting)

    async with open_stream(app) as stream:
        assert [event.data async for event in stream] == [str(i) for i in range(50)]
    assert most == 1


async def test_a_response_serves_one_request() -> None:
    response = EventSourceResponse(items("a"))
    await body_of(response)
    with pytest.raises(StreamClosedError, match="new one for each request"):
        await body_of(response)


async def test_other_scopes_are_refused() -> None:
    with pytest.raises(TypeError, match="'websocket'"):
        await EventSourceResponse([])({"type": "websocket"}, None, None)  # type: ignore[arg-type]


async def a_coroutine() -> list[str]:
    return []


async def a_generator() -> AsyncIterator[str]:
    yield ""


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: EventSourceResponse(a_coroutine()), TypeError, "await it"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse(a_generator), TypeError, "call it"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse(None), TypeError, "content must be iterable"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse(5), TypeError, "content must be iterable, got 5"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse("text"), TypeError, "put it in a list"),
        (lambda: EventSourceResponse(b"bytes"), TypeError, "put it in a list"),
        (lambda: EventSourceResponse({"data": 1}), TypeError, "put it in a list"),
        (
            lambda: EventSourceResponse([], sep="x"),
            ValueError,
            "sep must be a line end, '\\n', '\\r\\n' or '\\r', got 'x'",
        ),
        (lambda: EventSourceResponse([], ping=-1), ValueError, "ping must be at least 0 or None, got -1"),
        (lambda: EventSourceResponse([], ping="5"), TypeError, "ping must be a number or None, got '5'"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse([], ping=True), TypeError, "ping must be a number or None, got True"),
        (lambda: EventSourceResponse([], ping=float("nan")), ValueError, "ping must be at least 0 or None, got nan"),
        (
            lambda: EventSourceResponse([], send_timeout=-1),
            ValueError,
            "send_timeout must be at least 0 or None, got -1",
        ),
        (
            lambda: EventSourceResponse([], max_lifetime=-1),
            ValueError,
            "max_lifetime must be at least 0 or None, got -1",
        ),
        (lambda: EventSourceResponse([], cleanup_timeout=-1), ValueError, "cleanup_timeout must be at least 0, got -1"),
        (
            lambda: EventSourceResponse([], cleanup_timeout=None),  # type: ignore[arg-type]
            TypeError,
            "cleanup_timeout must be a number, got None",
        ),
        (lambda: EventSourceResponse([], open_timeout=-1), ValueError, "open_timeout must be at least 0, got -1"),
        (
            lambda: EventSourceResponse([], retry=-1),
            ValueError,
            "retry must be a whole number of milliseconds, at least 0, got -1",
        ),
        (
            lambda: EventSourceResponse([], retry=1.5),  # type: ignore[arg-type]
            ValueError,
            "retry must be a whole number of milliseconds, at least 0, got 1.5",
        ),
        (lambda: EventSourceResponse([], on_close="x"), TypeError, "on_close must be callable or None, got 'x'"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse([], headers={"x": "a\r\nb"}), ValueError, "inject"),
        (lambda: EventSourceResponse([], headers={"x y": "a"}), ValueError, "'x y'"),
        (lambda: EventSourceResponse([], headers={"": "a"}), ValueError, "name"),
        (lambda: EventSourceResponse([], headers={"x": "✓"}), ValueError, "✓"),
        (lambda: EventSourceResponse([], headers={"x": 1}), TypeError, "two str"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse([], headers={"Content-Length": "5"}), ValueError, "content-length"),
        (lambda: EventSourceResponse([], headers={"Content-Type": "text/html"}), ValueError, "text/html"),
        (
            lambda: EventSourceResponse([], headers="X-A: b"),  # type: ignore[arg-type]
            TypeError,
            "headers must be a mapping or pairs (name, value), got 'X-A: b'",
        ),
        (
            lambda: EventSourceResponse([], headers=["a: b"]),  # type: ignore[list-item]
            TypeError,
            "headers must be a mapping or pairs (name, value), got ['a: b']",
        ),
        (
            lambda: EventSourceResponse([], headers=["ab"]),  # type: ignore[list-item]
            TypeError,
            "headers must be a mapping or pairs (name, value), got ['ab']",
        ),
        (lambda: EventSourceResponse([], headers=[("a",)]), TypeError, "pairs (name, value)"),  # type: ignore[list-item]
        (
            lambda: EventSourceResponse([], headers=5),  # type: ignore[arg-type]
            TypeError,
            "headers must be a mapping or pairs (name, value), got 5",
        ),
        (lambda: EventSourceResponse([], registry=True), TypeError, "registry must be a StreamRegistry, got True"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse(HTTPError(404)), TypeError, "raise the HTTPError instead of returning it"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse([], status_code=204), ValueError, "with a body, got 204"),
        (lambda: EventSourceResponse([], status_code=99), ValueError, "with a body, got 99"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    make: Callable[[], EventSourceResponse], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=re.escape(named)):
        make()


@pytest.mark.real_time
async def test_a_synchronous_source_runs_in_one_thread_and_context() -> None:

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
async def test_a_synchronous_source_is_closed_in_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
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
async def test_a_blocked_synchronous_source_does_not_hold_the_disconnect() -> None:

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
async def test_threads_are_bounded_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
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
async def test_errors_of_synchronous_sources() -> None:
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
