"""Adoption: event streams that the app inside `SSEMiddleware` sends without this library."""

import gc
import re
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from asgi_sse import EventSourceResponse, SSEMiddleware
from asgi_sse.testing import OpenStream, open_stream

pytestmark = pytest.mark.anyio

START: Any = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def body(data: bytes, *, more: bool = True) -> Any:
    return {"type": "http.response.body", "body": data, "more_body": more}


class SendingApp:
    """Sends the given chunks, one a second, and records how it ended.

    With `receives`, it then waits for its disconnect.
    """

    def __init__(self, *chunks: bytes, start: Any = START, pause: float = 1.0, receives: bool = False) -> None:
        self.chunks = chunks
        self.start = start
        self.pause = pause
        self.receives = receives
        self.seen: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        try:
            await send(self.start)
            for chunk in self.chunks:
                await send(body(chunk))
                await anyio.sleep(self.pause)
            if self.receives:
                while (message := await receive())["type"] != "http.disconnect":
                    self.seen.append(message["type"])
                self.seen.append("disconnect")
                return
            await send(body(b"", more=False))
            self.seen.append("returned")
        except BaseException as exc:
            self.seen.append(type(exc).__name__)
            raise


async def read_all(stream: OpenStream) -> bytes:
    data = b""
    while chunk := await stream.read(timeout=120):
        data += chunk
    return data


async def test_body_is_unchanged_and_headers_are_added() -> None:
    chunks = [b"id: 1\r\ndata: a", b"bc\r", b"\n\r\n", b"data: x\n\n", b": foreign\n\n"]
    app = SSEMiddleware(SendingApp(*chunks), retry=7, ping=60)
    async with open_stream(app, "/foreign") as stream:
        assert stream.headers == {
            "content-type": "text/event-stream",
            "cache-control": "no-store, no-transform",
            "x-accel-buffering": "no",
        }
        (running,) = app.registry
        assert running.path == "/foreign"
        assert await read_all(stream) == b"".join(chunks)
        assert stream.complete
    assert app.registry.statistics().closed == {"finished": 1}
    assert app.registry.statistics().events == len(chunks)


async def test_headers_of_the_app_are_kept() -> None:
    start = {**START, "headers": [(b"Content-Type", b"text/event-stream"), (b"Cache-Control", b"private")]}
    async with open_stream(SSEMiddleware(SendingApp(b"data: x\n\n", start=start))) as stream:
        assert stream.headers["Cache-Control"] == "private"
        assert "cache-control" not in stream.headers
        assert stream.headers["x-accel-buffering"] == "no"


async def test_response_start_is_sent_before_the_first_event() -> None:
    async def sends_late(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await anyio.sleep(12)
        await send(body(b"data: late\n\n", more=False))

    began = anyio.current_time()
    async with open_stream(SSEMiddleware(sends_late, ping=5)) as stream:
        assert anyio.current_time() - began < 0.1
        assert await read_all(stream) == b": ping\n\n" * 2 + b"data: late\n\n"


async def test_keep_alives_are_sent_between_events_only() -> None:
    chunks = [b"data: a", b"\n", b"\n", b"data: b\r\n\r\n"]
    async with open_stream(SSEMiddleware(SendingApp(*chunks, pause=7), ping=5)) as stream:
        assert await read_all(stream) == b"data: a\n\n: ping\n\ndata: b\r\n\r\n: ping\n\n"


@pytest.mark.parametrize("receives", [True, False])
async def test_disconnect_reaches_the_app(receives: bool) -> None:
    app = SendingApp(*[b"data: x\n\n"] * (1 if receives else 10_000), pause=0.01, receives=receives)
    async with open_stream(SSEMiddleware(app)) as stream:
        await stream.receive()
        await anyio.sleep(0.1)
        began = anyio.current_time()
        await stream.disconnect()
        assert anyio.current_time() - began < 0.7
    if receives:
        assert app.seen == ["http.request", "disconnect"]
    else:
        assert app.seen in (["CancelledError"], ["Cancelled"])


@pytest.mark.real_time  # the virtual clock only advances while every task waits
async def test_app_that_sends_without_waiting_is_cancelled() -> None:
    async def flood(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        while True:
            await send(body(b"data: x\n\n"))

    async with open_stream(SSEMiddleware(flood)) as stream:
        await stream.receive(10)
        with anyio.fail_after(30):
            await stream.disconnect()


async def test_app_waits_for_a_slow_client() -> None:
    sent = 0

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send(START)
        for _ in range(10_000):
            await send(body(b"data: " + b"x" * 1000 + b"\n\n"))
            sent += 1
        await send(body(b"", more=False))

    async with open_stream(SSEMiddleware(flood, send_timeout=None), capacity=2) as stream:
        await anyio.sleep(5)
        assert sent < 400
        assert len(await read_all(stream)) == 10_000 * 1008
        assert stream.complete


async def test_client_that_does_not_read_is_dropped() -> None:
    app = SendingApp(*[b"data: " + b"x" * 20_000 + b"\n\n"] * 100, pause=0)
    middleware = SSEMiddleware(app, send_timeout=3)
    with pytest.raises(TimeoutError):
        async with open_stream(middleware, capacity=1):
            await anyio.sleep(10)
            assert middleware.registry.statistics().closed == {"timed_out": 1}
            assert len(app.seen) == 1


async def test_drain_ends_an_adopted_stream() -> None:
    app = SendingApp(*[b"data: x\n\n"] * 1000)
    middleware = SSEMiddleware(app)
    async with open_stream(middleware) as stream:
        await stream.receive()
        report = await middleware.registry.drain()
        assert (await read_all(stream)).startswith(b"retry: ")
        assert stream.complete
    assert report.closed == 1
    assert app.seen in (["CancelledError"], ["Cancelled"])
    async with open_stream(middleware) as stream:  # a stream that begins during the drain
        assert re.fullmatch(rb"(data: x\n\n)?retry: \d+\n\n", await read_all(stream))


async def test_signal_ends_an_adopted_stream() -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        async with open_stream(SSEMiddleware(SendingApp(*[b"data: x\n\n"] * 1000))) as stream:
            await stream.receive()
            signal.raise_signal(signal.SIGTERM)
            assert (await read_all(stream)).startswith(b"retry: ")
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_error_of_the_app_cuts_the_body_and_is_raised() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(b"data: just before\n\n"))
        raise LookupError("of the app")

    with pytest.raises(LookupError, match="of the app"):
        async with open_stream(SSEMiddleware(fails)) as stream:
            assert await stream.read() == b"data: just before\n\n"
            await stream.read()
    assert not stream.complete


async def test_incomplete_body_stays_incomplete() -> None:
    async def returns(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(b"data: x\n\n"))

    async with open_stream(SSEMiddleware(returns)) as stream:
        assert await read_all(stream) == b"data: x\n\n"
        assert not stream.complete


SCOPE: Any = {"type": "http", "method": "GET", "path": "/", "headers": []}


async def receive_nothing() -> Any:
    await anyio.sleep_forever()


@pytest.mark.parametrize("handles_it", [False, True])
async def test_error_of_the_servers_send_is_raised_in_the_app(handles_it: bool) -> None:
    raised = []

    async def sends(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        try:
            for number in range(10):
                await send(body(b"data: %d\n\n" % number))
                await anyio.sleep(0.2)
        except ValueError as exc:
            raised.append((str(exc), number))
            if not handles_it:
                raise

    async def send(message: Any) -> None:
        if message.get("body") == b"data: 1\n\n":
            raise ValueError("out of order")

    if handles_it:
        await SSEMiddleware(sends)(dict(SCOPE), receive_nothing, send)
    else:
        with pytest.raises(ValueError, match="out of order"):
            await SSEMiddleware(sends)(dict(SCOPE), receive_nothing, send)
    assert raised == [("out of order", 2)]


@pytest.mark.parametrize("drain", [False, True])
async def test_app_that_received_its_disconnect_is_not_cancelled(drain: bool) -> None:
    """Its clean-up and its background tasks have unlimited time, as without the middleware."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(b"data: x\n\n"))
        while (await receive())["type"] != "http.disconnect":
            pass
        await anyio.sleep(20)
        seen.append("cleaned up")

    middleware = SSEMiddleware(app)
    async with open_stream(middleware) as stream:
        await stream.receive()
        if drain:
            await middleware.registry.drain()
            assert (await read_all(stream)).startswith(b"retry: ")
        else:
            await stream.disconnect()
    assert seen == ["cleaned up"]


async def test_cancelled_app_has_time_to_clean_up(anyio_backend_name: str) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("in trio, each await of a cancelled task raises")
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(5)
            seen.append("cleaned up")

    async with open_stream(SSEMiddleware(app)) as stream:
        await stream.disconnect()
    assert seen == ["cleaned up"]


async def test_cancellation_by_the_server_does_not_wait_for_the_client() -> None:
    async def flood(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        while True:
            await send(body(b"data: " + b"x" * 5000 + b"\n\n"))

    async def blocked_send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    began = anyio.current_time()
    with anyio.move_on_after(2):
        await SSEMiddleware(flood, send_timeout=None)(dict(SCOPE), receive_nothing, blocked_send)
    assert anyio.current_time() - began < 2.5


async def test_two_tasks_may_send() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def send_many(name: bytes) -> None:
            for number in range(50):
                await send(body(b"data: %b %d %b\n\n" % (name, number, b"x" * 2000)))

        await send(START)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_many, b"a")
            tasks.start_soon(send_many, b"b")
        await send(body(b"", more=False))

    async with open_stream(SSEMiddleware(app), capacity=1) as stream:
        data = [str(event.data).split() async for event in stream]
    for name in "ab":
        assert [int(words[1]) for words in data if words[0] == name] == list(range(50))


async def test_headers_may_be_an_iterator() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        kind = b"text/event-stream" if scope["path"] == "/stream" else b"text/plain"
        pairs = [(b"x-before", b"1"), (b"content-type", kind), (b"x-after", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": (pair for pair in pairs)})
        await send(body(b"data: x\n\n", more=False))

    for path in ("/stream", "/page"):
        async with open_stream(SSEMiddleware(app), path) as stream:
            assert (stream.headers["x-before"], stream.headers["x-after"]) == ("1", "2")


async def test_changes_of_the_scope_are_visible_outside() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert b"accept-encoding" not in dict(scope["headers"])
        scope["route"] = "/events"
        await send(START)
        await send(body(b"data: x\n\n", more=False))

    async def send(message: Any) -> None:
        pass

    headers = [(b"accept", b"text/event-stream"), (b"accept-encoding", b"gzip")]
    scope = {**SCOPE, "headers": headers}
    await SSEMiddleware(app)(scope, receive_nothing, send)
    assert scope["route"] == "/events"
    assert scope["headers"] is headers


def test_request_leaves_no_reference_cycles() -> None:
    async def main() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/fails":
                raise LookupError
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            await send(body(b"x", more=False))

        async def send(message: Any) -> None:
            pass

        wrapped = SSEMiddleware(app)
        await wrapped(dict(SCOPE), receive_nothing, send)
        gc.collect()
        gc.freeze()  # what earlier tests left does not count if it becomes garbage now
        gc.disable()
        try:
            for path in ("/", "/fails") * 50:
                with suppress(LookupError):
                    await wrapped({**SCOPE, "path": path}, receive_nothing, send)
            assert gc.collect() < 10
        finally:
            gc.enable()
            gc.unfreeze()

    anyio.run(main)


async def test_unread_upload_does_not_hide_the_disconnect() -> None:
    app = SendingApp(*[b"data: x\n\n"] * 1000)
    messages: list[Any] = [{"type": "http.request", "body": b"x" * 10_000, "more_body": True}] * 3

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await anyio.sleep(3)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    began = anyio.current_time()
    await SSEMiddleware(app)({**SCOPE, "method": "POST"}, receive, send)
    assert anyio.current_time() - began < 4


async def test_app_reads_its_upload_during_the_stream() -> None:
    async def echoes(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
            await send(body(b"data: %d\n\n" % len(message["body"])))
        await send(body(b"", more=False))

    pieces = [b"x" * 10, b"x" * 20, b"x" * 30]
    messages = [{"type": "http.request", "body": piece, "more_body": piece != pieces[-1]} for piece in pieces]
    received = 0

    async def receive() -> Any:
        nonlocal received
        if received == len(messages):
            await anyio.sleep_forever()
        received += 1
        return messages[received - 1]

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await SSEMiddleware(echoes)(scope, receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == b"data: 10\n\ndata: 20\n\ndata: 30\n\n"


def start_with(**changes: Any) -> Any:
    return {**START, **changes}


@pytest.mark.parametrize(
    ("start", "method"),
    [
        (start_with(status=204), "GET"),
        (start_with(status=404), "GET"),
        (start_with(status=206), "GET"),
        (start_with(status=201), "GET"),
        (start_with(trailers=True), "GET"),
        (start_with(headers=[*START["headers"], (b"Content-Length", b"9")]), "GET"),
        (start_with(headers=[*START["headers"], (b"content-range", b"bytes 0-8/9")]), "GET"),
        (start_with(headers=[*START["headers"], (b"Content-Encoding", b"gzip")]), "GET"),
        (start_with(headers=[(b"content-type", b"text/plain")]), "GET"),
        (START, "HEAD"),
    ],
)
async def test_other_response_passes_unchanged(start: Any, method: str) -> None:
    middleware = SSEMiddleware(SendingApp(b"data: x\n\n", start=start, pause=20), ping=1, compressors="off")
    async with open_stream(middleware, method=method) as stream:
        assert stream.status == start["status"]
        assert "x-accel-buffering" not in stream.headers
        assert await read_all(stream) == b"data: x\n\n"
        assert len(middleware.registry) == 0
    assert middleware.registry.statistics().opened == 0


@pytest.mark.parametrize("late", [False, True])
async def test_file_that_the_server_sends_passes_unchanged(late: bool) -> None:
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        if late:
            await anyio.sleep(1)
        await send({"type": "http.response.pathsend", "path": "/some/file"})
        await anyio.sleep(20)  # longer than the interval of keep-alives

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await SSEMiddleware(app)(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.pathsend"]
    assert late or sent[0] is START


async def test_adoption_can_be_turned_off() -> None:
    middleware = SSEMiddleware(SendingApp(b"data: x\n\n", pause=20), adopt=False, ping=1)
    async with open_stream(middleware) as stream:
        assert await read_all(stream) == b"data: x\n\n"
        assert "x-accel-buffering" not in stream.headers
    assert middleware.registry.statistics().opened == 0


async def test_inner_of_two_middlewares_adopts() -> None:
    inner = SSEMiddleware(SendingApp(b"data: x\n\n", pause=7), ping=5)
    outer = SSEMiddleware(inner, ping=5)
    async with open_stream(outer) as stream:
        assert await read_all(stream) == b"data: x\n\n: ping\n\n"
    assert (inner.registry.statistics().opened, outer.registry.statistics().opened) == (1, 0)


async def test_stream_of_this_library_is_not_adopted() -> None:
    async def source() -> AsyncIterator[str]:
        yield "x"
        await anyio.sleep(7)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await EventSourceResponse(source())(scope, receive, send)

    middleware = SSEMiddleware(app, ping=5)
    async with open_stream(middleware) as stream:
        assert (await read_all(stream)).count(b": ping\n\n") == 1
    assert middleware.registry.statistics().opened == 1


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("early", [None, "drained", "disconnected"])
async def test_second_response_after_a_stream_is_discarded(own: bool, early: str | None) -> None:
    sent: list[str] = []

    async def source() -> AsyncIterator[str]:
        yield "x"
        await anyio.sleep(3600 if early else 1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if own:
            await EventSourceResponse(source(), retry=None)(scope, receive, send)
        else:
            await SendingApp(b"data: x\n\n", receives=early is not None)(scope, receive, send)
        await Response("second")(scope, receive, send)

    middleware = SSEMiddleware(app)

    async def recorded(scope: Any, receive: Any, send: Any) -> None:
        async def record(message: Any) -> None:
            sent.append(message["type"])
            await send(message)

        await middleware(scope, receive, record)

    async with open_stream(recorded) as stream:
        assert (await stream.receive()).data == "x"
        if early == "drained":
            middleware.registry.begin_drain()
        if early != "disconnected":
            assert b"second" not in await read_all(stream)
            assert stream.complete
    assert sent.count("http.response.start") == 1


async def test_second_response_during_a_drain_is_discarded() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await EventSourceResponse(["x"])(scope, receive, send)
        await Response("second")(scope, receive, send)

    middleware = SSEMiddleware(app)
    middleware.registry.begin_drain()
    async with open_stream(middleware) as stream:
        assert re.fullmatch(rb"retry: \d+\n\n", await read_all(stream))
        assert stream.complete


async def test_background_task_of_starlette_runs_after_the_stream() -> None:
    seen: list[str] = []

    async def events() -> AsyncIterator[str]:
        try:
            for number in range(3):
                yield f"data: {number}\n\n"
                await anyio.sleep(1)
        finally:
            seen.append("finally")

    async def later() -> None:
        await anyio.sleep(1)
        seen.append("background")

    async def endpoint(request: Any) -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream", background=BackgroundTask(later))

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    middlewares = [Middleware(BaseHTTPMiddleware, dispatch=dispatch)] * 2
    for app in (
        Starlette(routes=[Route("/", endpoint)]),
        Starlette(routes=[Route("/", endpoint)], middleware=middlewares),
    ):
        seen.clear()
        middleware = SSEMiddleware(app, ping=5)
        async with open_stream(middleware) as stream:
            assert await read_all(stream) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
            assert stream.complete
            await anyio.sleep(3)
        assert seen == ["finally", "background"]
        seen.clear()
        async with open_stream(middleware) as stream:
            await stream.receive()
            await stream.disconnect()
        assert "finally" in seen
