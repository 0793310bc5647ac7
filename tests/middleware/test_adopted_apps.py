"""Adopted apps that receive, fail or send in unusual ways, and middlewares with parts turned off."""

import logging
import signal
from typing import Any

import anyio
import pytest

from asgi_sse import Broker, EventSourceResponse, SSEMiddleware, create_app
from asgi_sse.testing import OpenStream, open_stream, running

pytestmark = pytest.mark.anyio

START: Any = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
SCOPE: Any = {"type": "http", "method": "GET", "path": "/", "headers": []}


def body(data: bytes, *, more: bool = True) -> Any:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def read_all(stream: OpenStream) -> bytes:
    data = b""
    while chunk := await stream.read(timeout=120):
        data += chunk
    return data


async def never() -> Any:
    await anyio.sleep_forever()


class Listening:
    """An app that listens for its disconnect from the start of the request, and sends meanwhile."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self.events = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def listen() -> None:
            while not self.received or self.received[-1] != "http.disconnect":
                self.received.append((await receive())["type"])
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            await anyio.sleep(1)  # the listener waits in receive() before the response starts
            await send(START)
            while True:
                await send(body(b"data: x\n\n"))
                self.events += 1
                await anyio.sleep(0.5)


@pytest.mark.parametrize("drain", [False, True])
async def test_app_that_listens_from_the_start_learns_of_the_end_of_its_stream(drain: bool) -> None:
    app = Listening()
    middleware = SSEMiddleware(app)
    async with open_stream(middleware) as stream:
        for _ in range(3):
            await stream.expect("x")
        if drain:
            await middleware.registry.drain()
            assert (await read_all(stream)).endswith(b"\n\n")
            assert stream.complete
        else:
            await stream.disconnect()
    assert app.received[:1] == ["http.request"]
    assert middleware.registry.statistics().closed == {"drained" if drain else "disconnected": 1}
    assert 3 <= app.events <= 4


async def test_disconnect_that_the_app_was_already_waiting_for_reaches_it_once() -> None:
    """The middleware does not read beside the app, which would take the message away from it."""
    received = []
    left = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with anyio.create_task_group() as tasks:

            async def listen() -> None:
                received.append((await receive())["type"])
                await anyio.sleep(20)  # its clean-up, which is longer than any time limit of the middleware
                received.append("cleaned up")

            tasks.start_soon(listen)
            await anyio.wait_all_tasks_blocked()
            await send(START)
            await send(body(b"data: x\n\n"))

    async def receive() -> Any:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            left.set()

    middleware = SSEMiddleware(app)
    await middleware(dict(SCOPE), receive, send)
    assert received == ["http.disconnect", "cleaned up"]
    assert middleware.registry.statistics().closed == {"disconnected": 1}


async def test_upload_that_the_app_was_already_waiting_for_reaches_it() -> None:
    received = []
    opened, read = anyio.Event(), anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with anyio.create_task_group() as tasks:

            async def listen() -> None:
                received.append((await receive()).get("body"))
                received.append((await receive()).get("body"))
                read.set()
                received.append((await receive())["type"])

            tasks.start_soon(listen)
            await anyio.wait_all_tasks_blocked()
            await send(START)
            await send(body(b"data: x\n\n"))

    async def receive() -> Any:
        await (opened if len(received) < 2 else read).wait()
        if messages:
            return {"type": "http.request", "body": messages.pop(0), "more_body": bool(messages)}
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            opened.set()

    messages = [b"a", b"b"]
    await SSEMiddleware(app)({**SCOPE, "method": "POST"}, receive, send)
    assert received == [b"a", b"b", "http.disconnect"]


async def test_large_upload_is_left_with_the_server_until_the_app_reads_it() -> None:
    chunk = b"x" * 40_000
    asked = 0
    read = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(b"data: x\n\n"))
        await anyio.sleep(10)
        read.append(asked)
        while (message := await receive())["more_body"]:
            assert message["body"] == chunk
        await send(body(b"data: y\n\n", more=False))

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        if asked > 11:
            await anyio.sleep_forever()
        return {"type": "http.request", "body": chunk, "more_body": asked < 11}

    sent = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    await SSEMiddleware(app)({**SCOPE, "method": "POST"}, receive, send)
    assert read == [2]  # so much was read ahead, to find a disconnect
    assert asked >= 11
    assert b"".join(sent) == b"data: x\n\ndata: y\n\n"


async def test_file_that_is_sent_in_parts_passes_unchanged() -> None:
    parts = [{"type": "http.response.zerocopysend", "file": number, "more_body": number < 3} for number in (1, 2, 3)]
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        for part in parts:
            await send(part)
            await anyio.sleep(20)

    async def send(message: Any) -> None:
        sent.append(message)

    await SSEMiddleware(app)(dict(SCOPE), never, send)
    assert sent == [START, *parts]


async def test_app_that_ignores_its_cancellation_is_cancelled_again(
    anyio_backend_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("in trio, each await of a cancelled task raises")
    cancellations: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(b"data: x\n\n"))
        while len(cancellations) < 2:
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                cancellations.append(anyio.current_time())

    middleware = SSEMiddleware(app, cleanup_timeout=5)
    async with open_stream(middleware) as stream:
        await stream.expect("x")
        await stream.disconnect()
    first, second = cancellations
    assert second - first == pytest.approx(5, abs=1)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "was not cleaned up within 5 s (cleanup_timeout) and ended when it was cancelled again" in warning
    assert middleware.registry.statistics().abandoned == 0


async def test_error_of_a_refused_app_is_not_raised() -> None:
    """Its stream has no client any more, which has its answer already."""
    raised = []

    async def encodes(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "headers": [*START["headers"], (b"content-encoding", b"gzip")]})
        raised.append((await receive())["type"])
        raise LookupError("no client")

    async with open_stream(SSEMiddleware(encodes, compressors="refuse")) as stream:
        assert stream.status == 500
        assert b"gzip-encoded by a middleware" in await read_all(stream)
        await stream.disconnect()
    assert raised == ["http.disconnect"]


async def test_middleware_with_everything_off_does_not_touch_other_responses() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((receive, send))
        await send(START)
        await send(body(b"", more=False))

    async def send(message: Any) -> None:
        """Take the message."""

    await SSEMiddleware(app, compressors="off", adopt=False)(dict(SCOPE), never, send)
    assert seen == [(never, send)]


async def test_middleware_without_a_search_for_compressors_runs_its_lifespan() -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await EventSourceResponse(["a"])(scope, receive, send)

    app = SSEMiddleware(inner, compressors="off")
    async with running(app) as server, open_stream(server) as stream:
        await stream.expect("a")
        await stream.expect_end()


async def test_adopted_stream_ignores_signals_if_they_are_off() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        for _ in range(5):
            await send(body(b"data: x\n\n"))
            await anyio.sleep(1)
        await send(body(b"", more=False))

    numbers = []
    handler = lambda number, frame: numbers.append(number)  # noqa: E731
    before = signal.signal(signal.SIGTERM, handler)
    try:
        async with open_stream(SSEMiddleware(app, signals=False)) as stream:
            await stream.expect("x")
            assert signal.getsignal(signal.SIGTERM) is handler
            signal.raise_signal(signal.SIGTERM)
            assert await read_all(stream) == b"data: x\n\n" * 4
    finally:
        signal.signal(signal.SIGTERM, before)
    assert numbers == [signal.SIGTERM]


async def test_broker_of_two_servers_stays_open_for_the_one_that_runs_on() -> None:
    broker = Broker()
    app = create_app({"/news": lambda: broker.subscribe("news")}, broker=broker)
    async with (
        running(app) as one,
        running(app) as other,
        open_stream(one, "/news") as ending,
        open_stream(other, "/news") as stream,
    ):
        await broker.publish("news", "first")
        await ending.expect("first")
        await stream.expect("first")
        await one.stop()
        await ending.expect_end()
        await broker.publish("news", "second")
        await stream.expect("second")
