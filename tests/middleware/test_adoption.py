"""Event streams that an app sends by itself, behind `SSEMiddleware`: unchanged, kept alive, ended."""

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

HEAD: Any = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def body(data: bytes, *, more: bool = True) -> Any:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Sends:
    """An app that sends what it is given, an event each second, and writes down how it ended."""

    def __init__(self, *chunks: bytes, head: Any = HEAD, pause: float = 1.0, asks: bool = False) -> None:
        self.chunks = chunks
        self.head = head
        self.pause = pause
        self.asks = asks
        self.seen: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        try:
            await send(self.head)
            for chunk in self.chunks:
                await send(body(chunk))
                await anyio.sleep(self.pause)
            if self.asks:
                while (message := await receive())["type"] != "http.disconnect":
                    self.seen.append(message["type"])
                self.seen.append("disconnect")
                return
            await send(body(b"", more=False))
            self.seen.append("returned")
        except BaseException as exc:
            self.seen.append(type(exc).__name__)
            raise


async def all_of(stream: OpenStream) -> bytes:
    data = b""
    while chunk := await stream.read(timeout=120):
        data += chunk
    return data


async def test_its_bytes_stay_as_they_are_and_its_head_gains() -> None:
    chunks = [b"id: 1\r\ndata: a", b"bc\r", b"\n\r\n", b"data: x\n\n", b": theirs\n\n"]
    app = SSEMiddleware(Sends(*chunks), retry=7, ping=60)
    async with open_stream(app, "/theirs") as stream:
        assert stream.headers == {
            "content-type": "text/event-stream",
            "cache-control": "no-store, no-transform",
            "x-accel-buffering": "no",
        }
        (running,) = app.registry
        assert running.path == "/theirs"
        assert await all_of(stream) == b"".join(chunks)
        assert stream.complete
    assert app.registry.statistics().closed == {"finished": 1}
    assert app.registry.statistics().events == len(chunks)


async def test_what_the_app_says_itself_stays() -> None:
    head = {**HEAD, "headers": [(b"Content-Type", b"text/event-stream"), (b"Cache-Control", b"private")]}
    async with open_stream(SSEMiddleware(Sends(b"data: x\n\n", head=head))) as stream:
        assert stream.headers["Cache-Control"] == "private"
        assert "cache-control" not in stream.headers
        assert stream.headers["x-accel-buffering"] == "no"


async def test_the_head_goes_out_before_the_first_event() -> None:
    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        await anyio.sleep(12)
        await send(body(b"data: late\n\n", more=False))

    began = anyio.current_time()
    async with open_stream(SSEMiddleware(waits, ping=5)) as stream:
        assert anyio.current_time() - began < 0.1
        assert await all_of(stream) == b": ping\n\n" * 2 + b"data: late\n\n"


async def test_comments_come_between_events_alone() -> None:
    chunks = [b"data: a", b"\n", b"\n", b"data: b\r\n\r\n"]
    async with open_stream(SSEMiddleware(Sends(*chunks, pause=7), ping=5)) as stream:
        assert await all_of(stream) == b"data: a\n\n: ping\n\ndata: b\r\n\r\n: ping\n\n"


@pytest.mark.parametrize("asks", [True, False])
async def test_a_disconnect_reaches_the_app(asks: bool) -> None:
    app = Sends(*[b"data: x\n\n"] * (1 if asks else 10_000), pause=0.01, asks=asks)
    async with open_stream(SSEMiddleware(app)) as stream:
        await stream.receive()
        await anyio.sleep(0.1)
        began = anyio.current_time()
        await stream.disconnect()
        assert anyio.current_time() - began < 0.7
    if asks:
        assert app.seen == ["http.request", "disconnect"]
    else:
        assert app.seen in (["CancelledError"], ["Cancelled"])


@pytest.mark.real_time  # the virtual clock moves on when nobody has anything to do
async def test_an_app_that_sends_without_ever_waiting_is_ended() -> None:
    async def flood(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        while True:
            await send(body(b"data: x\n\n"))

    async with open_stream(SSEMiddleware(flood)) as stream:
        await stream.receive(10)
        with anyio.fail_after(30):
            await stream.disconnect()


async def test_backpressure() -> None:
    sent = 0

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send(HEAD)
        for _ in range(10_000):
            await send(body(b"data: " + b"x" * 1000 + b"\n\n"))
            sent += 1
        await send(body(b"", more=False))

    async with open_stream(SSEMiddleware(flood, send_timeout=None), capacity=2) as stream:
        await anyio.sleep(5)
        assert sent < 400
        assert len(await all_of(stream)) == 10_000 * 1008
        assert stream.complete


async def test_a_client_that_does_not_read_is_dropped() -> None:
    app = Sends(*[b"data: " + b"x" * 20_000 + b"\n\n"] * 100, pause=0)
    middleware = SSEMiddleware(app, send_timeout=3)
    with pytest.raises(TimeoutError):
        async with open_stream(middleware, capacity=1):
            await anyio.sleep(10)
            assert middleware.registry.statistics().closed == {"timed_out": 1}
            assert len(app.seen) == 1


async def test_it_ends_when_the_server_stops() -> None:
    app = Sends(*[b"data: x\n\n"] * 1000)
    middleware = SSEMiddleware(app)
    async with open_stream(middleware) as stream:
        await stream.receive()
        report = await middleware.registry.drain()
        assert (await all_of(stream)).startswith(b"retry: ")
        assert stream.complete
    assert report.closed == 1
    assert app.seen in (["CancelledError"], ["Cancelled"])
    async with open_stream(middleware) as stream:  # and one that comes then, with what it has sent by now
        assert re.fullmatch(rb"(data: x\n\n)?retry: \d+\n\n", await all_of(stream))


async def test_a_signal_ends_it() -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        async with open_stream(SSEMiddleware(Sends(*[b"data: x\n\n"] * 1000))) as stream:
            await stream.receive()
            signal.raise_signal(signal.SIGTERM)
            assert (await all_of(stream)).startswith(b"retry: ")
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_an_error_leaves_the_body_cut_and_is_raised() -> None:
    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        await send(body(b"data: just before\n\n"))
        raise LookupError("theirs")

    with pytest.raises(LookupError, match="theirs"):
        async with open_stream(SSEMiddleware(breaks)) as stream:
            assert await stream.read() == b"data: just before\n\n"
            await stream.read()
    assert not stream.complete


async def test_a_body_without_an_end_stays_without() -> None:
    async def returns(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        await send(body(b"data: x\n\n"))

    async with open_stream(SSEMiddleware(returns)) as stream:
        assert await all_of(stream) == b"data: x\n\n"
        assert not stream.complete


SCOPE: Any = {"type": "http", "method": "GET", "path": "/", "headers": []}


async def never() -> Any:
    await anyio.sleep_forever()


@pytest.mark.parametrize("deals_with_it", [False, True])
async def test_what_the_server_s_send_raises_reaches_the_app(deals_with_it: bool) -> None:
    raised = []

    async def asks(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        try:
            for number in range(10):
                await send(body(b"data: %d\n\n" % number))
                await anyio.sleep(0.2)
        except ValueError as exc:
            raised.append((str(exc), number))
            if not deals_with_it:
                raise

    async def send(message: Any) -> None:
        if message.get("body") == b"data: 1\n\n":
            raise ValueError("out of order")

    if deals_with_it:
        await SSEMiddleware(asks)(dict(SCOPE), never, send)
    else:
        with pytest.raises(ValueError, match="out of order"):
            await SSEMiddleware(asks)(dict(SCOPE), never, send)
    assert raised == [("out of order", 2)]


@pytest.mark.parametrize("drain", [False, True])
async def test_an_app_that_asked_for_its_disconnect_is_on_its_own_then(drain: bool) -> None:
    """As without the wrapper: its clean-up and its background tasks take the time that they take."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
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
            assert (await all_of(stream)).startswith(b"retry: ")
        else:
            await stream.disconnect()
    assert seen == ["cleaned up"]


async def test_an_app_that_is_cancelled_has_time_to_clean_up(anyio_backend_name: str) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("trio cancels for good")
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(5)
            seen.append("cleaned up")

    async with open_stream(SSEMiddleware(app)) as stream:
        await stream.disconnect()
    assert seen == ["cleaned up"]


async def test_a_cancellation_from_outside_waits_for_no_client() -> None:
    async def flood(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        while True:
            await send(body(b"data: " + b"x" * 5000 + b"\n\n"))

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    began = anyio.current_time()
    with anyio.move_on_after(2):
        await SSEMiddleware(flood, send_timeout=None)(dict(SCOPE), never, stuck)
    assert anyio.current_time() - began < 2.5


async def test_sends_from_two_tasks() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def sends(name: bytes) -> None:
            for number in range(50):
                await send(body(b"data: %b %d %b\n\n" % (name, number, b"x" * 2000)))

        await send(HEAD)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sends, b"a")
            tasks.start_soon(sends, b"b")
        await send(body(b"", more=False))

    async with open_stream(SSEMiddleware(app), capacity=1) as stream:
        data = [str(event.data).split() async for event in stream]
    for name in "ab":
        assert [int(words[1]) for words in data if words[0] == name] == list(range(50))


async def test_headers_that_can_be_read_once() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        kind = b"text/event-stream" if scope["path"] == "/stream" else b"text/plain"
        pairs = [(b"x-before", b"1"), (b"content-type", kind), (b"x-after", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": (pair for pair in pairs)})
        await send(body(b"data: x\n\n", more=False))

    for path in ("/stream", "/page"):
        async with open_stream(SSEMiddleware(app), path) as stream:
            assert (stream.headers["x-before"], stream.headers["x-after"]) == ("1", "2")


async def test_what_the_app_writes_into_its_scope_is_seen_around_us() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert b"accept-encoding" not in dict(scope["headers"])
        scope["route"] = "/events"
        await send(HEAD)
        await send(body(b"data: x\n\n", more=False))

    async def send(message: Any) -> None:
        pass

    headers = [(b"accept", b"text/event-stream"), (b"accept-encoding", b"gzip")]
    scope = {**SCOPE, "headers": headers}
    await SSEMiddleware(app)(scope, never, send)
    assert scope["route"] == "/events"
    assert scope["headers"] is headers


def test_a_request_leaves_no_garbage() -> None:
    async def main() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/breaks":
                raise LookupError
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            await send(body(b"x", more=False))

        async def send(message: Any) -> None:
            pass

        wrapped = SSEMiddleware(app)
        await wrapped(dict(SCOPE), never, send)
        gc.collect()
        gc.disable()
        try:
            for path in ("/", "/breaks") * 50:
                with suppress(LookupError):
                    await wrapped({**SCOPE, "path": path}, never, send)
            assert gc.collect() < 10
        finally:
            gc.enable()

    anyio.run(main)


async def test_an_upload_that_nobody_reads_hides_no_disconnect() -> None:
    app = Sends(*[b"data: x\n\n"] * 1000)
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


async def test_an_upload_that_goes_on_is_the_app_s() -> None:
    async def echoes(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
            await send(body(b"data: %d\n\n" % len(message["body"])))
        await send(body(b"", more=False))

    pieces = [b"x" * 10, b"x" * 20, b"x" * 30]
    messages = [{"type": "http.request", "body": piece, "more_body": piece != pieces[-1]} for piece in pieces]
    asked = 0

    async def receive() -> Any:
        nonlocal asked
        if asked == len(messages):
            await anyio.sleep_forever()
        asked += 1
        return messages[asked - 1]

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await SSEMiddleware(echoes)(scope, receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == b"data: 10\n\ndata: 20\n\ndata: 30\n\n"


def plain(**changes: Any) -> Any:
    return {**HEAD, **changes}


@pytest.mark.parametrize(
    ("head", "method"),
    [
        (plain(status=204), "GET"),
        (plain(status=404), "GET"),
        (plain(status=206), "GET"),
        (plain(status=201), "GET"),
        (plain(trailers=True), "GET"),
        (plain(headers=[*HEAD["headers"], (b"Content-Length", b"9")]), "GET"),
        (plain(headers=[*HEAD["headers"], (b"content-range", b"bytes 0-8/9")]), "GET"),
        (plain(headers=[*HEAD["headers"], (b"Content-Encoding", b"gzip")]), "GET"),
        (plain(headers=[(b"content-type", b"text/plain")]), "GET"),
        (HEAD, "HEAD"),
    ],
)
async def test_what_is_not_adopted_passes_untouched(head: Any, method: str) -> None:
    middleware = SSEMiddleware(Sends(b"data: x\n\n", head=head, pause=20), ping=1, compressors="off")
    async with open_stream(middleware, method=method) as stream:
        assert stream.status == head["status"]
        assert "x-accel-buffering" not in stream.headers
        assert await all_of(stream) == b"data: x\n\n"
        assert len(middleware.registry) == 0
    assert middleware.registry.statistics().opened == 0


@pytest.mark.parametrize("late", [False, True])
async def test_a_file_that_the_server_sends_passes_untouched(late: bool) -> None:
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(HEAD)
        if late:
            await anyio.sleep(1)
        await send({"type": "http.response.pathsend", "path": "/some/file"})
        await anyio.sleep(20)  # for longer than a stream would be silent

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await SSEMiddleware(app)(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.pathsend"]
    assert late or sent[0] is HEAD


async def test_adopt_off() -> None:
    middleware = SSEMiddleware(Sends(b"data: x\n\n", pause=20), adopt=False, ping=1)
    async with open_stream(middleware) as stream:
        assert await all_of(stream) == b"data: x\n\n"
        assert "x-accel-buffering" not in stream.headers
    assert middleware.registry.statistics().opened == 0


async def test_two_wrappers_adopt_it_once() -> None:
    inner = SSEMiddleware(Sends(b"data: x\n\n", pause=7), ping=5)
    outer = SSEMiddleware(inner, ping=5)
    async with open_stream(outer) as stream:
        assert await all_of(stream) == b"data: x\n\n: ping\n\n"
    assert (inner.registry.statistics().opened, outer.registry.statistics().opened) == (1, 0)


async def test_a_stream_of_ours_inside_of_the_app_is_left_alone() -> None:
    async def source() -> AsyncIterator[str]:
        yield "x"
        await anyio.sleep(7)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await EventSourceResponse(source())(scope, receive, send)

    middleware = SSEMiddleware(app, ping=5)
    async with open_stream(middleware) as stream:
        assert (await all_of(stream)).count(b": ping\n\n") == 1
    assert middleware.registry.statistics().opened == 1


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("early", [None, "drained", "disconnected"])
async def test_an_app_that_answers_once_more_behind_its_stream(ours: bool, early: str | None) -> None:
    sent: list[str] = []

    async def source() -> AsyncIterator[str]:
        yield "x"
        await anyio.sleep(3600 if early else 1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if ours:
            await EventSourceResponse(source(), retry=None)(scope, receive, send)
        else:
            await Sends(b"data: x\n\n", asks=early is not None)(scope, receive, send)
        await Response("again")(scope, receive, send)

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
            assert b"again" not in await all_of(stream)
            assert stream.complete
    assert sent.count("http.response.start") == 1


async def test_a_request_to_a_server_that_stops_already_may_be_answered_once_more() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await EventSourceResponse(["x"])(scope, receive, send)
        await Response("again")(scope, receive, send)

    middleware = SSEMiddleware(app)
    middleware.registry.begin_drain()
    async with open_stream(middleware) as stream:
        assert re.fullmatch(rb"retry: \d+\n\n", await all_of(stream))
        assert stream.complete


async def test_a_stream_of_starlette_with_its_background_task() -> None:
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
            assert await all_of(stream) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
            assert stream.complete
            await anyio.sleep(3)
        assert seen == ["finally", "background"]
        seen.clear()
        async with open_stream(middleware) as stream:
            await stream.receive()
            await stream.disconnect()
        assert "finally" in seen
