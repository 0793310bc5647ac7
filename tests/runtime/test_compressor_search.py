"""Compressors in the stack, inside SSEMiddleware and around it: they are found, bypassed, refused or reported."""

import gzip
import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.middleware.base import BaseHTTPMiddleware

from asgi_sse import EventSourceResponse, SSEMiddleware
from asgi_sse.testing import OpenStream, VirtualTimeLoop, open_stream

pytestmark = pytest.mark.anyio

EVENT_STREAM_REQUEST = {"Accept": "text/event-stream", "Accept-Encoding": "gzip"}


class GZipMiddleware:
    """Behaves as the worst existing compressors do: encodes every response and sends it at the end."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or b"gzip" not in dict(scope["headers"]).get(b"accept-encoding", b""):
            await self.app(scope, receive, send)
            return
        start: Any = None
        chunks: list[bytes] = []

        async def gzip_send(message: Any) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if not chunks:
                start["headers"].append((b"content-encoding", b"gzip"))
                await send(start)
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                await send({"type": "http.response.body", "body": gzip.compress(b"".join(chunks)), "more_body": False})

        await self.app(scope, receive, gzip_send)


class Collector:
    """Holds back a response without adding a response header.

    With `headers_too` it also holds the headers, until the first part of the body.
    """

    def __init__(self, app: Any, *, headers_too: bool) -> None:
        self.app = app
        self.headers_too = headers_too

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        messages: list[Any] = []

        async def collect(message: Any) -> None:
            if message["type"] == "http.response.start" and not self.headers_too:
                await send(message)
                return
            messages.append(message)
            if message["type"] == "http.response.body" and (self.headers_too or not message.get("more_body", False)):
                for one in messages:
                    await send(one)
                messages.clear()

        await self.app(scope, receive, collect)


async def events() -> AsyncIterator[str]:
    for number in range(3):
        yield str(number)
        await anyio.sleep(2)


async def app_with_ours(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/page":
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
        await send(start)
        await send({"type": "http.response.body", "body": b"page"})
        return
    await EventSourceResponse(events())(scope, receive, send)


async def text(stream: OpenStream) -> str:
    data = b""
    while chunk := await stream.read(timeout=60):
        data += chunk
    return data.decode("latin-1")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_event_stream_requests_bypass_the_compressor(caplog: pytest.LogCaptureFixture) -> None:
    app = SSEMiddleware(GZipMiddleware(app_with_ours))
    async with open_stream(app, headers=EVENT_STREAM_REQUEST) as stream:
        assert "content-encoding" not in stream.headers
        began = anyio.current_time()
        assert (await stream.receive()).data == "0"
        assert anyio.current_time() - began < 0.1
        assert "data: 2" in await text(stream)
    async with open_stream(app, "/page", headers={"Accept-Encoding": "gzip"}) as stream:
        assert stream.headers["content-encoding"] == "gzip"
    assert app.registry.statistics().compressed == {}
    assert warnings(caplog) == []  # the compressor is unknown, and a name alone proves nothing


async def test_compressed_stream_without_accept_header_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    """``fetch`` sends ``Accept: */*``, so the request does not bypass the compressor."""
    app = SSEMiddleware(GZipMiddleware(app_with_ours))
    for _ in range(2):
        async with open_stream(app, headers={"Accept": "*/*", "Accept-Encoding": "gzip"}) as stream:
            assert stream.headers["content-encoding"] == "gzip"
            await text(stream)
    assert app.registry.statistics().compressed == {"encoded": 2, "buffered": 2}
    first, second = warnings(caplog)
    cause = "The cause is probably test_compressor_search.GZipMiddleware (app)"
    assert f"the event stream / left the app gzip-encoded. {cause}" in first
    assert "has sent events, but none has left the app" in second


async def test_refused_stream_gets_a_500_that_names_the_compressor() -> None:
    seen = []

    async def waits_for_disconnect(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        while (message := await receive())["type"] != "http.disconnect":
            pass
        seen.append(message["type"])
        await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    app = SSEMiddleware(GZipMiddleware(waits_for_disconnect), compressors="refuse")
    async with open_stream(app, headers=EVENT_STREAM_REQUEST) as stream:
        assert stream.status == 500
        answer = await text(stream)
        assert "gzip-encoded by a middleware" in answer
        assert "test_compressor_search.GZipMiddleware (app): exclude the paths of the streams from it." in answer
        assert stream.headers["content-length"] == str(len(answer))
        assert stream.complete
        await anyio.sleep(1)
    assert seen == ["http.disconnect"]
    async with open_stream(SSEMiddleware(app_with_ours, compressors="refuse"), headers=EVENT_STREAM_REQUEST) as stream:
        assert "data: 2" in await text(stream)


async def test_refused_response_of_ours_leaves_no_stream() -> None:
    app = SSEMiddleware(GZipMiddleware(app_with_ours), compressors="refuse")
    async with open_stream(app, headers=EVENT_STREAM_REQUEST) as stream:
        assert stream.status == 500
        await text(stream)
        await anyio.sleep(10)
    assert len(app.registry) == 0


async def test_refused_app_that_never_receives_is_cancelled() -> None:
    seen = []

    async def only_sends(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
                await anyio.sleep(0.1)
        finally:
            seen.append("finally")

    app = SSEMiddleware(GZipMiddleware(only_sends), compressors="refuse")
    async with open_stream(app, headers=EVENT_STREAM_REQUEST) as stream:
        assert stream.status == 500
        await text(stream)
        await anyio.sleep(1)
        assert seen == ["finally"]


@pytest.mark.parametrize("adopt", [True, False])
async def test_off_compresses_without_a_warning(adopt: bool, caplog: pytest.LogCaptureFixture) -> None:
    app = SSEMiddleware(GZipMiddleware(app_with_ours), compressors="off", adopt=adopt)
    async with open_stream(app, headers=EVENT_STREAM_REQUEST) as stream:
        assert stream.headers["content-encoding"] == "gzip"
        await text(stream)
    assert warnings(caplog) == []
    assert app.registry.statistics().compressed == {}


async def test_buffered_and_held_streams_are_counted_apart(caplog: pytest.LogCaptureFixture) -> None:
    app = SSEMiddleware(Collector(app_with_ours, headers_too=False))
    async with open_stream(app) as stream:
        await text(stream)
    assert app.registry.statistics().compressed == {"buffered": 1}
    (line,) = warnings(caplog)
    assert "none has left the app" in line

    async def starts_late(scope: Any, receive: Any, send: Any) -> None:
        async def source() -> AsyncIterator[str]:
            await anyio.sleep(5)
            yield "late"

        await EventSourceResponse(source(), retry=None, opening_comment=False)(scope, receive, send)

    app = SSEMiddleware(Collector(starts_late, headers_too=True), open_timeout=0.1)
    async with open_stream(app) as stream:
        await text(stream)
    assert app.registry.statistics().compressed == {"held": 1}
    assert len(warnings(caplog)) == 1  # an opening comment releases the headers, so this is logged at INFO only


warned: list[str] = []  # of all variants of the next test, because the warning comes once per process


async def test_compressor_around_the_app_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    app = SSEMiddleware(app_with_ours, {"/route": events})
    for path in ("/route", "/inner"):
        async with open_stream(GZipMiddleware(app), path, headers=EVENT_STREAM_REQUEST) as stream:
            assert stream.headers["content-encoding"] == "gzip"
            await text(stream)
    assert app.registry.statistics().compressed == {"encoded": 2}
    warned.extend(warnings(caplog))
    assert len(warned) == 1
    assert "was gzip-encoded by test_compressor_search.GZipMiddleware" in warned[0]


def closure(app: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def wrapped_send(message: Any) -> None:
            await send(message)

        await app(scope, receive, wrapped_send)

    return middleware


def base_http(app: Any) -> Any:
    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    return BaseHTTPMiddleware(app, dispatch)


LAYERS = {"closure": closure, "base_http": base_http, "gzip": GZipMiddleware, "ours": SSEMiddleware}


@settings(max_examples=40, deadline=None)
@given(st.permutations(["closure", "base_http", "gzip", "ours"]), st.booleans())
def test_compressor_is_handled_at_every_place_of_a_stack(order: list[str], accepts: bool) -> None:
    """A compressor inside is bypassed, one around us is counted, and a stack without one counts nothing."""

    async def main(layers: list[str]) -> None:
        app: Any = app_with_ours
        ours: Any = None
        for name in layers:  # from the inside out
            app = LAYERS[name](app)
            ours = app if name == "ours" else ours
        headers = {"Accept": "text/event-stream" if accepts else "*/*", "Accept-Encoding": "gzip"}
        async with open_stream(app, headers=headers) as stream:
            encoded = "content-encoding" in stream.headers
            await stream.read(timeout=20)
            while await stream.read(timeout=20):
                pass
        assert stream.complete
        inside = "gzip" in layers and layers.index("gzip") < layers.index("ours")
        assert encoded == ("gzip" in layers and not (inside and accepts))
        assert ("encoded" in ours.registry.statistics().compressed) == encoded
        if "gzip" not in layers:
            assert ours.registry.statistics().compressed == {}

    for layers in (order, [name for name in order if name != "gzip"]):
        anyio.run(main, layers, backend_options={"loop_factory": VirtualTimeLoop})


@pytest.mark.parametrize("compression", ["gzip", None, True])
def test_compressors_option_refuses_unknown_values(compression: Any) -> None:
    with pytest.raises(ValueError, match="compressors must be"):
        SSEMiddleware(app_with_ours, compressors=compression)
