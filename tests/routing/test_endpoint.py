"""`create_app`, `Request` and `HTTPError`: what becomes of a request before its stream begins."""

import functools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from asgi_lifespan import LifespanManager

from asgi_sse import (
    EventSourceResponse,
    HTTPError,
    InvalidEventError,
    Request,
    ServerSentEvent,
    StreamClosedError,
    StreamRegistry,
    create_app,
)
from asgi_sse.testing import OpenStream, open_stream

pytestmark = pytest.mark.anyio


async def ticks() -> AsyncIterator[str]:
    yield "tick"


async def plain_app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"yes")]})
    await send({"type": "http.response.body", "body": repr(scope["path_params"]).encode()})


async def text(stream: OpenStream) -> str:
    body = b""
    while chunk := await stream.read(timeout=100):
        body += chunk
    assert stream.complete
    return body.decode()


async def data(stream: OpenStream) -> list[str | None]:
    return [event.data async for event in stream]


async def test_paths() -> None:
    async def user(request: Request) -> AsyncIterator[Any]:
        yield {"data": request.path_params}

    async def me() -> AsyncIterator[str]:
        yield "me"

    app = create_app({"/users/{name}/events": user, "/users/me/events": me, "/": ticks})
    for path, expected in {
        "/users/ann/events": '{"name":"ann"}',
        "/users/a%20b/events": '{"name":"a b"}',
        "/users/me/events": "me",
        "/": "tick",
    }.items():
        async with open_stream(app, path) as stream:
            assert await data(stream) == [expected]
    for path in ["/users", "/users//events", "/users/ann/events/", "/nope", "//"]:
        async with open_stream(app, path) as stream:
            assert stream.status == 404
            assert await text(stream) == "Not Found"


async def test_root_path() -> None:
    async def where(request: Request) -> AsyncIterator[str]:
        yield request.path

    app = create_app({"/events": where, "/": where})
    for root, path, expected in [
        ("/api", "/api/events", "/events"),
        ("/api", "/events", "/events"),  # servers that do not put the prefix before the path
        ("/events", "/events", "/"),
        ("/events", "/events/", "/"),
        ("/api/", "/api/events", "/events"),
        ("", "/events", "/events"),
    ]:
        async with open_stream(app, path, scope={"root_path": root}) as stream:
            assert await data(stream) == [expected], (root, path)


class AnApp:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await plain_app(scope, receive, send)


class OldApp:
    """ASGI 2: a class that is called twice."""

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    async def __call__(self, receive: Any, send: Any) -> None:
        await plain_app(self.scope, receive, send)


class Method:
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


async def with_default(word: Any = "default") -> AsyncIterator[Any]:
    yield "a Request" if isinstance(word, Request) else word


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (ticks, ["tick"]),
        (Method().events, ["method"]),
        (Method(), ["tick"]),
        (returns_response, ["tick"]),
        (returns_content, ["tick"]),
        (not_async, ["tick"]),
        (lambda: ticks(), ["tick"]),  # noqa: PLW0108 (a lambda is what is tried here)
        (functools.partial(ticks), ["tick"]),
        (with_default, ["a Request"]),
    ],
)
async def test_endpoints(endpoint: Any, expected: list[str]) -> None:
    async with open_stream(create_app({"/": endpoint})) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert await data(stream) == expected


@pytest.mark.parametrize("endpoint", [plain_app, AnApp(), OldApp, returns_app])
async def test_apps_as_endpoints(endpoint: Any) -> None:
    for method in ("GET", "POST") if endpoint is returns_app else ("GET", "PUT"):
        async with open_stream(create_app({"/{x}": endpoint}), "/5", method=method) as stream:
            assert stream.headers["x-app"] == "yes"
            assert (await stream.read()) == b"{'x': '5'}"


@pytest.mark.real_time
async def test_synchronous_generator_endpoint() -> None:
    def count(request: Request) -> Iterator[int]:
        yield from range(int(request.query["n"]))

    async with open_stream(create_app({"/": count}), "/?n=3") as stream:
        assert await data(stream) == ["0", "1", "2"]


async def test_methods() -> None:
    app = create_app({"/": ticks})
    for method in ("GET", "POST"):
        async with open_stream(app, method=method) as stream:
            assert await data(stream) == ["tick"]
    async with open_stream(app, method="HEAD") as stream:
        assert stream.status == 200
        assert await text(stream) == ""
    async with open_stream(app, "/nope", method="HEAD") as stream:
        assert stream.status == 404
        assert await text(stream) == ""
    for method in ("PUT", "DELETE", "OPTIONS"):
        async with open_stream(app, method=method) as stream:
            assert stream.status == 405
            assert stream.headers["allow"] == "GET, HEAD, POST"


async def test_request() -> None:
    seen: list[Request] = []

    async def endpoint(request: Request) -> AsyncIterator[str]:
        seen.append(request)
        yield "x"

    async with open_stream(
        create_app({"/p/{a}": endpoint}),
        "/p/%C3%BC?x=1&x=2&empty=&y=%20z",
        method="POST",
        headers=[("X-A", "1"), ("x-a", "2"), ("Cookie", 'a=1; b="two%20"; junk'), ("cookie", "c=3")],
        scope={"state": {"db": 5}},
    ) as stream:
        await stream.receive()
    (request,) = seen
    assert (request.method, request.path, request.path_params) == ("POST", "/p/ü", {"a": "ü"})
    assert dict(request.query) == {"x": "2", "empty": "", "y": " z"}
    assert request.query.getlist("x") == ["1", "2"]
    assert request.query.getlist("none") == []
    assert request.headers["X-a"] == "1, 2"
    assert request.headers.getlist("X-A") == ["1", "2"]
    assert "X-A" in request.headers
    assert "x-b" not in request.headers
    assert request.headers.get("x-b") is None
    assert len(request.headers) == 2
    assert "x-a" in repr(request.headers)
    assert request.cookies == {"a": "1", "b": "two ", "c": "3"}
    assert request.client == ("127.0.0.1", 50000)
    assert request.state == {"db": 5}
    assert request.scope["path"] == "/p/ü"
    assert request.last_event_id is None
    assert not request.draining.is_set()


@pytest.mark.parametrize(
    ("path", "header", "expected"),
    [
        ("/", "41", "41"),
        ("/?last_event_id=7", None, "7"),
        ("/?last_event_id=7", "41", "41"),
        ("/?last_event_id=7", "", "7"),
        ("/?last_event_id=", None, None),
        ("/", "ü✓".encode().decode("latin-1"), "ü✓"),
    ],
)
async def test_last_event_id(path: str, header: str | None, expected: str | None) -> None:
    async def endpoint(request: Request) -> AsyncIterator[Any]:
        yield {"data": [request.last_event_id]}

    headers = {} if header is None else {"Last-Event-ID": header}
    async with open_stream(create_app({"/": endpoint}), path, headers=headers) as stream:
        assert (await stream.receive()).data == ServerSentEvent([expected]).data


async def echo(request: Request) -> AsyncIterator[str]:
    yield (await request.body(limit=100)).decode()
    yield (await request.body()).decode()  # again: it is kept


async def test_body() -> None:
    async with open_stream(create_app({"/": echo}), method="POST", body=b"prompt") as stream:
        assert await data(stream) == ["prompt", "prompt"]


async def test_body_without_one() -> None:
    async with open_stream(create_app({"/": echo})) as stream:
        assert await data(stream) == ["", ""]


@pytest.mark.parametrize("headers", [{}, {"content-length": "101"}, {"content-length": "9" * 5000}])
async def test_body_over_the_limit(headers: dict[str, str]) -> None:
    async with open_stream(create_app({"/": echo}), method="POST", body=b"x" * 101, headers=headers) as stream:
        assert stream.status == 413
        assert await text(stream) == "the body has more than 100 bytes"


def in_pieces(app: Any, pieces: list[bytes], gap: float, *, end: bool = True) -> Any:
    """`app`, whose request's body comes piece by piece; `end`: with its end, or else the client leaves."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        left = list(pieces)

        async def slow_receive() -> Any:
            if left:
                await anyio.sleep(gap)
                return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or not end}
            return {"type": "http.disconnect"} if not end else await receive()

        await app(scope, slow_receive, send)

    return wrapped


async def test_the_head_is_held_while_the_body_is_read() -> None:
    """An upload of ten seconds leaves the status open: reads of the body do not count."""

    async def endpoint(request: Request) -> AsyncIterator[str]:
        await request.body(limit=25)
        yield "never"

    async with open_stream(in_pieces(create_app({"/": endpoint}), [b"x" * 10] * 10, 1), method="POST") as stream:
        assert stream.status == 413


async def test_json_body() -> None:
    async def endpoint(request: Request) -> AsyncIterator[Any]:
        yield {"data": await request.json()}

    app = create_app({"/": endpoint})
    async with open_stream(app, method="POST", body=b'{"prompt": "hi"}') as stream:
        assert await data(stream) == ['{"prompt":"hi"}']
    for bad in (b"{", b"\xff", b"[" * 100_000):
        async with open_stream(app, method="POST", body=bad) as stream:
            assert stream.status == 400
            assert "not JSON" in await text(stream)


async def test_body_in_a_coroutine_endpoint() -> None:
    async def endpoint(request: Request) -> Any:
        prompt = (await request.body()).decode()

        async def answer() -> AsyncIterator[str]:
            yield prompt

        return answer()

    app = in_pieces(create_app({"/": endpoint}), [b"a", b"b", b"c"], 1)
    async with open_stream(app, method="POST") as stream:
        assert await data(stream) == ["abc"]


async def test_body_of_a_client_that_left() -> None:
    errors = []

    async def endpoint(request: Request) -> Any:
        try:
            await request.body()
        except StreamClosedError as exc:
            errors.append(str(exc))
            raise HTTPError(499, "gone") from exc

    async with open_stream(in_pieces(create_app({"/": endpoint}), [b"a"], 1, end=False), method="POST") as stream:
        assert stream.status == 499
    assert "the client left" in errors[0]


async def test_a_generator_that_reads_the_body_of_a_client_that_left() -> None:
    """No error to log: it is how the read learns of the disconnect."""
    closed = []

    async def endpoint(request: Request) -> AsyncIterator[bytes]:
        try:
            yield await request.body()
        finally:
            closed.append(True)

    async def coroutine(request: Request) -> Any:
        return [await request.body()]

    for target in (endpoint, coroutine):
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)  # noqa: B023

        app = in_pieces(create_app({"/": target}), [b"a"], 1, end=False)
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        await app(scope, None, send)
        assert sent == []
    assert closed == [True]


async def test_body_after_the_first_event() -> None:
    async def endpoint(request: Request) -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep(1)
        try:
            await request.body()
        except StreamClosedError as exc:
            yield str(exc)

    app = in_pieces(create_app({"/": endpoint}), [b"x" * 100_000] * 3, 0.1)
    async with open_stream(app, method="POST") as stream:
        assert "read it before" in str((await data(stream))[1])


async def test_an_unread_body_neither_piles_up_nor_hides_the_disconnect() -> None:
    taken = 0

    async def waits(request: Request) -> AsyncIterator[str]:
        await anyio.sleep(0.5)
        held.append(taken)
        yield "x"
        await anyio.sleep_forever()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def flood() -> Any:
            nonlocal taken
            if taken < 50:
                taken += 1
                return {"type": "http.request", "body": b"x" * 10_000, "more_body": True}
            return await receive()

        await create_app({"/": waits})(scope, flood, send)

    held: list[int] = []
    async with open_stream(app, method="POST") as stream:
        await stream.receive()
        await anyio.sleep(1)
        assert taken == 50
        stream._body = None
        await stream.disconnect()
    assert held[0] < 10


async def test_a_large_body_that_was_read_does_not_hide_the_disconnect() -> None:
    closed = []

    async def endpoint(request: Request) -> Any:
        await request.body()

        async def source() -> AsyncIterator[str]:
            try:
                yield "x"
                await anyio.sleep_forever()
            finally:
                closed.append(True)

        return source()

    async with open_stream(create_app({"/": endpoint}), method="POST", body=b"x" * 200_000) as stream:
        await stream.receive()
        with anyio.fail_after(5):
            await stream.disconnect()
    assert closed


async def test_two_tasks_read_one_body() -> None:
    bodies = []

    async def endpoint(request: Request) -> Any:
        async def read() -> None:
            bodies.append(await request.body())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            tasks.start_soon(read)
        return ticks()

    async with open_stream(in_pieces(create_app({"/": endpoint}), [b"a", b"b"], 1), method="POST") as stream:
        assert await data(stream) == ["tick"]
    assert bodies == [b"ab", b"ab"]


async def test_a_task_reads_the_body_while_the_stream_watches() -> None:
    """One reader of `receive()` at a time, whoever it is, and the disconnect is seen by the one that is left."""
    bodies = []

    async def endpoint(request: Request) -> Any:
        async def source() -> AsyncIterator[str]:
            async with anyio.create_task_group() as tasks:

                async def read() -> None:
                    bodies.append(await request.body())

                tasks.start_soon(read)
                await anyio.sleep(5)
                yield "x"
                await anyio.sleep_forever()

        return source()

    async with open_stream(
        in_pieces(create_app({"/": endpoint}, open_timeout=10), [b"a", b"b", b"c"], 1), method="POST"
    ) as stream:
        await stream.receive(timeout=10)
        with anyio.fail_after(5):
            await stream.disconnect()
    assert bodies == [b"abc"]


async def test_a_returned_app_gets_an_empty_body_that_was_read() -> None:
    async def reading_app(scope: Any, receive: Any, send: Any) -> None:
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        scope["path_params"] = {}
        await plain_app(scope, receive, send)

    async def endpoint(request: Request) -> Any:
        assert await request.body() == b""
        return reading_app

    async with open_stream(create_app({"/": endpoint}), method="POST", headers={"content-length": "0"}) as stream:
        assert stream.status == 200


async def test_an_http_error_of_a_returned_app_is_the_apps_own() -> None:
    async def half_done(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise HTTPError(403)

    async def endpoint() -> Any:
        return half_done

    with pytest.raises(HTTPError, match="403"):
        async with open_stream(create_app({"/": endpoint})) as stream:
            assert stream.status == 200
            await stream.read()


async def test_a_returned_app_gets_the_body_whole() -> None:
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


async def test_http_errors_keep_their_status() -> None:
    async def refuses(request: Request) -> AsyncIterator[str]:
        await anyio.sleep(0.5)  # within the second for which the head is held
        raise HTTPError(int(request.query["status"]), request.query.get("detail", ""), {"X-Why": "because"})
        yield

    app = create_app({"/": refuses})
    for status, body in {403: "Forbidden", 418: "I'm a Teapot", 500: "Internal Server Error", 599: ""}.items():
        async with open_stream(app, f"/?status={status}") as stream:
            assert stream.status == status
            assert stream.headers["x-why"] == "because"
            assert (await text(stream)).lower() == body.lower()
    async with open_stream(app, "/?status=404&detail=%C3%BC") as stream:
        assert await text(stream) == "ü"
        assert stream.headers["content-type"] == "text/plain; charset=utf-8"
    async with open_stream(app, "/?status=204") as stream:
        assert stream.status == 204
        assert "content-length" not in stream.headers
        assert await text(stream) == ""


async def test_an_http_error_after_the_head_is_an_error_like_any() -> None:
    async def late() -> AsyncIterator[str]:
        yield "x"
        raise HTTPError(403)

    with pytest.raises(HTTPError, match="403 Forbidden"):
        async with open_stream(create_app({"/": late})) as stream:
            assert (await stream.receive()).data == "x"
            await stream.receive()


async def test_the_head_is_held_for_as_long_as_the_app_says() -> None:
    async def refuses() -> AsyncIterator[str]:
        await anyio.sleep(2.5)
        raise HTTPError(403)
        yield

    async with open_stream(create_app({"/": refuses}, open_timeout=3)) as stream:
        assert stream.status == 403


async def test_other_early_errors_reach_the_server_with_nothing_sent() -> None:
    async def broken() -> AsyncIterator[str]:
        await anyio.sleep(0.5)
        raise LookupError("broken")
        yield

    with pytest.raises(LookupError, match="broken"):
        async with open_stream(create_app({"/": broken})):
            pytest.fail("there should be no head")


async def test_an_endpoint_that_returns_nothing_is_told_so() -> None:
    async def nothing() -> None:
        pass

    with pytest.raises(TypeError, match="the endpoint of '/' must return events, a response or an ASGI app"):
        async with open_stream(create_app({"/": nothing})):
            pass


async def test_an_endpoint_that_returns_an_error_is_told_to_raise_it() -> None:
    async def gone() -> HTTPError:
        return HTTPError(410)

    expected = (
        "the endpoint of '/' must return events, a response or an ASGI app: "
        "content=HTTPError(410, 'Gone') is not iterable; raise the HTTPError, in place of "
    )
    with pytest.raises(TypeError, match=re.escape(expected)):
        async with open_stream(create_app({"/": gone})):
            pass


async def test_a_request_that_was_taken_for_something_else_is_shown() -> None:
    async def greet(name: Any) -> AsyncIterator[Any]:
        yield name

    for path, shown in (("/a/b?c=d", "<Request GET /a/b>"), ("/a/x%0Ay", r"<Request GET '/a/x\ny'>")):
        with pytest.raises(InvalidEventError, match=re.escape(f"cannot encode {shown}")):
            async with open_stream(create_app({"/a/{name}": greet}), path):
                pass


async def test_defaults_hold_for_responses_that_were_not_told() -> None:
    async def idle() -> AsyncIterator[str]:
        await anyio.sleep(10)
        yield "x"

    async def own(request: Request) -> EventSourceResponse:
        return EventSourceResponse(idle(), ping=0)

    async def as_built_in(request: Request) -> EventSourceResponse:
        return EventSourceResponse(idle(), ping=15, retry=3000, max_lifetime=None)

    registry = StreamRegistry()
    app = create_app(
        {"/": idle, "/own": own, "/built-in": as_built_in}, ping=4, retry=7, max_lifetime=13, registry=registry
    )
    async with open_stream(app, "/built-in") as stream:
        assert await text(stream) == ": stream opened\nretry: 3000\n\ndata: x\n\n"
    async with open_stream(app) as stream:
        assert await text(stream) == ": stream opened\nretry: 7\n\n: ping\n\n: ping\n\ndata: x\n\n"
    async with open_stream(app, "/own") as stream:
        assert await text(stream) == ": stream opened\nretry: 7\n\ndata: x\n\n"
    assert app.registry is registry
    assert registry.statistics().opened == 3


async def test_lifespan() -> None:
    app = create_app({"/": ticks})
    async with LifespanManager(app):
        assert not app.registry.draining
    assert not app.registry.draining
    async with LifespanManager(app):
        assert not app.registry.draining
        async with open_stream(app) as stream:
            assert await data(stream) == ["tick"]


async def test_websockets_are_refused() -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    await create_app({"/": ticks})({"type": "websocket", "path": "/"}, None, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1000}]


async def a_coroutine() -> None:
    """Passed where it should not be."""


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: create_app({"events": ticks}), ValueError, "a route must start with '/', got 'events'"),
        (lambda: create_app({5: ticks}), ValueError, "must start with '/', got 5"),  # type: ignore[dict-item]
        (lambda: create_app({"/a{b}": ticks}), ValueError, "'a{b}' in route '/a{b}'"),
        (lambda: create_app({"/{a": ticks}), ValueError, "'{a' in route '/{a'"),
        (lambda: create_app({"/a}": ticks}), ValueError, "'a}' in route '/a}'"),
        (lambda: create_app({"/{}": ticks}), ValueError, "got '{}'"),
        (lambda: create_app({"/{a-b}": ticks}), ValueError, "got '{a-b}'"),
        (lambda: create_app({"/{a}/{a}": ticks}), ValueError, "got '{a}' in route '/{a}/{a}'"),
        (lambda: create_app({"/{a}": ticks, "/{b}": ticks}), ValueError, "'/{a}' and '/{b}'"),
        (lambda: create_app({"/": None}), TypeError, "the endpoint of '/' must be callable, got None"),
        (lambda: create_app({"/": ticks()}), TypeError, "pass the function itself"),
        (lambda: create_app({"/": a_coroutine()}), TypeError, "pass the function itself"),
        (lambda: create_app({"/": AnApp}), TypeError, "is a class"),
        (lambda: create_app({"/": EventSourceResponse([])}), TypeError, "one request"),
        (lambda: create_app({"/": lambda a, b: None}), TypeError, "2 arguments"),
        (lambda: create_app({}, pong=5), TypeError, "unknown option 'pong'; the options are routes, broker, "),  # type: ignore[call-arg]
        (lambda: create_app({}, ping=-5), ValueError, "ping must be at least 0 or None, got -5"),
        (lambda: create_app({}, drain_timeout=3), TypeError, "registry=StreamRegistry(drain_timeout=3)"),  # type: ignore[call-arg]
        (lambda: create_app({}, drain_retry=(1, 2)), TypeError, "registry=StreamRegistry(drain_retry=(1, 2))"),  # type: ignore[call-arg]
        (lambda: create_app({}, registry=True), TypeError, "registry must be a StreamRegistry, got True"),  # type: ignore[arg-type]
        (lambda: create_app({"/a/<int:id>": ticks}), ValueError, "such as '/{name}', got '<int:id>'"),
        (lambda: create_app([("/", ticks)]), TypeError, "routes must be a mapping, got [('/', "),  # type: ignore[arg-type]
        (lambda: create_app({"/{id:int}": ticks}), ValueError, "there are no converters"),
        (lambda: create_app({"/a?b=1": ticks}), ValueError, "query"),
        (lambda: HTTPError(404, b"x"), TypeError, "detail must be a str, got b'x'"),  # type: ignore[arg-type]
        (lambda: HTTPError(99), ValueError, "status must be an int from 200 to 599, got 99"),
        (lambda: HTTPError("403"), ValueError, "status must be an int from 200 to 599, got '403'"),  # type: ignore[arg-type]
        (lambda: HTTPError(403, headers={"x": "a\nb"}), ValueError, "inject"),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=re.escape(named)):
        make()


async def test_bad_limit() -> None:
    async def endpoint(request: Request) -> AsyncIterator[bytes]:
        yield await request.body(limit=-1)

    with pytest.raises(ValueError, match="limit must be an int of at least 0 bytes, got -1"):
        async with open_stream(create_app({"/": endpoint})):
            pass
