"""Endpoints: which functions and apps answer a route, and what becomes of their errors."""

import functools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from stream_reading import read_data, read_text

from asgi_sse import EventSourceResponse, HTTPError, InvalidEventError, Request, StreamClosedError, create_app
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


async def ticks() -> AsyncIterator[str]:
    yield "tick"


async def plain_app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"yes")]})
    await send({"type": "http.response.body", "body": repr(scope["path_params"]).encode()})


class AnApp:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await plain_app(scope, receive, send)


class ASGI2App:
    """An app of ASGI 2: a class, whose instances are called."""

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    async def __call__(self, receive: Any, send: Any) -> None:
        await plain_app(self.scope, receive, send)


class Methods:
    async def events(self, request: Request) -> AsyncIterator[str]:
        yield "method"

    async def __call__(self) -> EventSourceResponse:
        return EventSourceResponse(ticks())


async def returns_response(request: Request) -> EventSourceResponse:
    return EventSourceResponse(ticks(), headers={"x-own": "1"})


async def returns_content() -> AsyncIterator[str]:
    return ticks()


async def returns_app() -> Any:
    return plain_app


def not_async(request: Request) -> Any:
    return ticks()


async def with_default(argument: Any = "default") -> AsyncIterator[Any]:
    yield "a Request" if isinstance(argument, Request) else argument


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (ticks, ["tick"]),
        (Methods().events, ["method"]),
        (Methods(), ["tick"]),
        (returns_response, ["tick"]),
        (returns_content, ["tick"]),
        (not_async, ["tick"]),
        (lambda: ticks(), ["tick"]),  # noqa: PLW0108 (a lambda is under test)
        (functools.partial(ticks), ["tick"]),
        (with_default, ["a Request"]),
    ],
)
async def test_endpoint_returns_events_or_a_response(endpoint: Any, expected: list[str]) -> None:
    async with open_stream(create_app({"/": endpoint})) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert await read_data(stream) == expected


async def any_arguments(*arguments: Any) -> None:
    """An app that a decorator wraps without keeping its signature."""
    await plain_app(*arguments)


class AppWithoutSignature(AnApp):
    """An app whose arguments are unknown, such as a function written in C."""

    __signature__ = "none"


@pytest.mark.parametrize("endpoint", [plain_app, AnApp(), ASGI2App, any_arguments, AppWithoutSignature(), returns_app])
async def test_endpoint_is_or_returns_an_asgi_app(endpoint: Any) -> None:
    for method in ("GET", "POST") if endpoint is returns_app else ("GET", "PUT"):
        async with open_stream(create_app({"/{x}": endpoint}), "/5", method=method) as stream:
            assert stream.headers["x-app"] == "yes"
            assert (await stream.read()) == b"{'x': '5'}"


@pytest.mark.real_time
async def test_endpoint_is_a_synchronous_generator() -> None:
    def count(request: Request) -> Iterator[int]:
        yield from range(int(request.query["n"]))

    async with open_stream(create_app({"/": count}), "/?n=3") as stream:
        assert await read_data(stream) == ["0", "1", "2"]


async def test_methods_other_than_get_head_and_post_are_answered_405() -> None:
    app = create_app({"/": ticks})
    for method in ("GET", "POST"):
        async with open_stream(app, method=method) as stream:
            assert await read_data(stream) == ["tick"]
    async with open_stream(app, method="HEAD") as stream:
        assert stream.status == 200
        assert await read_text(stream) == ""
    async with open_stream(app, "/nope", method="HEAD") as stream:
        assert stream.status == 404
        assert await read_text(stream) == ""
    for method in ("PUT", "DELETE", "OPTIONS"):
        async with open_stream(app, method=method) as stream:
            assert stream.status == 405
            assert stream.headers["allow"] == "GET, HEAD, POST"


async def test_returned_app_receives_an_empty_body_that_was_read() -> None:
    async def reading_app(scope: Any, receive: Any, send: Any) -> None:
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        scope["path_params"] = {}
        await plain_app(scope, receive, send)

    async def endpoint(request: Request) -> Any:
        assert await request.body() == b""
        return reading_app

    async with open_stream(create_app({"/": endpoint}), method="POST", headers={"content-length": "0"}) as stream:
        assert stream.status == 200


async def test_returned_app_receives_the_whole_body() -> None:
    async def reading_app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})
        assert (await receive())["type"] == "http.disconnect"

    async def reads_first(request: Request) -> Any:
        assert await request.body() == b"prompt"
        return reading_app

    async def does_not() -> Any:
        return reading_app

    for endpoint in (reads_first, does_not):
        async with open_stream(create_app({"/": endpoint}), method="POST", body=b"prompt") as stream:
            assert await stream.read() == b"prompt"


async def test_response_that_is_returned_twice_is_an_error_of_the_endpoint() -> None:
    kept = EventSourceResponse(["a"])

    async def endpoint() -> EventSourceResponse:
        return kept

    app = create_app({"/": endpoint})
    async with open_stream(app) as stream:
        assert await read_data(stream) == ["a"]
    with pytest.raises(StreamClosedError, match="already sent; make a new one for each request"):
        async with open_stream(app):
            pass


async def test_app_that_is_returned_after_the_client_left_receives_the_disconnect() -> None:
    received = []

    async def records(scope: Any, receive: Any, send: Any) -> None:
        received.extend([await receive(), await receive()])

    async def endpoint(request: Request) -> Any:
        with pytest.raises(StreamClosedError, match="the client left"):
            await request.body()
        return records

    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"a", "more_body": True}]

    async def receive() -> Any:
        return messages.pop()  # a server that has reported the disconnect may wait for ever

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    await create_app({"/": endpoint})(scope, receive, anyio.sleep_forever)  # type: ignore[arg-type]
    assert received == [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.disconnect"},
    ]


async def test_http_error_of_a_returned_app_is_not_answered() -> None:
    async def half_done(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise HTTPError(403)

    async def endpoint() -> Any:
        return half_done

    with pytest.raises(HTTPError, match="403"):
        async with open_stream(create_app({"/": endpoint})) as stream:
            assert stream.status == 200
            await stream.read()


async def test_http_error_before_the_first_event_sets_the_status() -> None:
    async def refuses(request: Request) -> AsyncIterator[str]:
        await anyio.sleep(0.5)  # within the second for which the response start waits
        raise HTTPError(int(request.query["status"]), request.query.get("detail", ""), {"X-Why": "because"})
        yield

    app = create_app({"/": refuses})
    for status, body in {403: "Forbidden", 418: "I'm a Teapot", 500: "Internal Server Error", 599: ""}.items():
        async with open_stream(app, f"/?status={status}") as stream:
            assert stream.status == status
            assert stream.headers["x-why"] == "because"
            assert (await read_text(stream)).lower() == body.lower()
    async with open_stream(app, "/?status=404&detail=%C3%BC") as stream:
        assert await read_text(stream) == "ü"
        assert stream.headers["content-type"] == "text/plain; charset=utf-8"
    async with open_stream(app, "/?status=204") as stream:
        assert stream.status == 204
        assert "content-length" not in stream.headers
        assert await read_text(stream) == ""


async def test_http_error_after_the_response_start_is_raised() -> None:
    async def late() -> AsyncIterator[str]:
        yield "x"
        raise HTTPError(403)

    with pytest.raises(HTTPError, match="403 Forbidden"):
        async with open_stream(create_app({"/": late})) as stream:
            assert (await stream.receive()).data == "x"
            await stream.receive()


async def test_open_timeout_delays_the_response_start() -> None:
    async def refuses() -> AsyncIterator[str]:
        await anyio.sleep(2.5)
        raise HTTPError(403)
        yield

    async with open_stream(create_app({"/": refuses}, open_timeout=3)) as stream:
        assert stream.status == 403


async def test_other_early_error_reaches_the_server_before_anything_is_sent() -> None:
    async def broken() -> AsyncIterator[str]:
        await anyio.sleep(0.5)
        raise LookupError("broken")
        yield

    with pytest.raises(LookupError, match="broken"):
        async with open_stream(create_app({"/": broken})):
            pytest.fail("the response start was sent")


async def test_endpoint_that_returns_none_raises_a_type_error() -> None:
    async def nothing() -> None:
        pass

    with pytest.raises(TypeError, match="the endpoint of '/' must return events, a response or an ASGI app"):
        async with open_stream(create_app({"/": nothing})):
            pass


async def test_endpoint_that_returns_an_error_raises_a_type_error() -> None:
    async def gone() -> HTTPError:
        return HTTPError(410)

    expected = (
        "the endpoint of '/' must return events, a response or an ASGI app: "
        "content must be iterable, got HTTPError(410, 'Gone'); raise the HTTPError instead of "
    )
    with pytest.raises(TypeError, match=re.escape(expected)):
        async with open_stream(create_app({"/": gone})):
            pass


async def test_error_about_a_yielded_request_shows_it() -> None:
    async def greet(name: Any) -> AsyncIterator[Any]:
        yield name

    for path, shown in (("/a/b?c=d", "<Request GET /a/b>"), ("/a/x%0Ay", r"<Request GET '/a/x\ny'>")):
        with pytest.raises(InvalidEventError, match=re.escape(f"cannot encode {shown}")):
            async with open_stream(create_app({"/a/{name}": greet}), path):
                pass


async def a_coroutine() -> None:
    """Called by mistake: its coroutine is passed as the endpoint."""


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: create_app({"/": None}), TypeError, "the endpoint of '/' must be callable, got None"),
        (lambda: create_app({"/": ticks()}), TypeError, "pass the function itself"),
        (lambda: create_app({"/": a_coroutine()}), TypeError, "pass the function itself"),
        (lambda: create_app({"/": AnApp}), TypeError, "is a class"),
        (lambda: create_app({"/": EventSourceResponse([])}), TypeError, "one request"),
        (lambda: create_app({"/": lambda a, b: None}), TypeError, "2 arguments"),
    ],
)
def test_invalid_endpoint_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()
