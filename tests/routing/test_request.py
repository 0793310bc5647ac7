"""`Request` and `HTTPError`: what an endpoint learns of its request, and how it refuses one."""

import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from stream_reading import read_data, read_text

from asgi_sse import HTTPError, Request, ServerSentEvent, StreamClosedError, create_app
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


async def ticks() -> AsyncIterator[str]:
    yield "tick"


async def test_request_shows_each_part_of_the_scope() -> None:
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
async def test_last_event_id_comes_from_the_header_or_the_query(
    path: str, header: str | None, expected: str | None
) -> None:
    async def endpoint(request: Request) -> AsyncIterator[Any]:
        yield {"data": [request.last_event_id]}

    headers = {} if header is None else {"Last-Event-ID": header}
    async with open_stream(create_app({"/": endpoint}), path, headers=headers) as stream:
        assert (await stream.receive()).data == ServerSentEvent([expected]).data


async def echo(request: Request) -> AsyncIterator[str]:
    yield (await request.body(limit=100)).decode()
    yield (await request.body()).decode()  # a second call returns the same body


async def test_body_can_be_read_twice() -> None:
    async with open_stream(create_app({"/": echo}), method="POST", body=b"prompt") as stream:
        assert await read_data(stream) == ["prompt", "prompt"]


async def test_body_of_a_get_is_empty() -> None:
    async with open_stream(create_app({"/": echo})) as stream:
        assert await read_data(stream) == ["", ""]


@pytest.mark.parametrize("headers", [{}, {"content-length": "101"}, {"content-length": "9" * 5000}])
async def test_body_over_the_limit_is_answered_413(headers: dict[str, str]) -> None:
    async with open_stream(create_app({"/": echo}), method="POST", body=b"x" * 101, headers=headers) as stream:
        assert stream.status == 413
        assert await read_text(stream) == "the body has more than 100 bytes"


def in_pieces(app: Any, pieces: list[bytes], gap: float, *, end: bool = True) -> Any:
    """Return `app` with a request body that arrives in pieces. Without `end`, the client leaves before its end."""

    async def app_in_pieces(scope: Any, receive: Any, send: Any) -> None:
        remaining = list(pieces)

        async def slow_receive() -> Any:
            if remaining:
                await anyio.sleep(gap)
                return {"type": "http.request", "body": remaining.pop(0), "more_body": bool(remaining) or not end}
            return {"type": "http.disconnect"} if not end else await receive()

        await app(scope, slow_receive, send)

    return app_in_pieces


async def test_response_start_waits_while_the_body_is_read() -> None:
    """The open timeout excludes the time of an upload: after ten seconds, the status is still open."""

    async def endpoint(request: Request) -> AsyncIterator[str]:
        await request.body(limit=25)
        yield "never"

    async with open_stream(in_pieces(create_app({"/": endpoint}), [b"x" * 10] * 10, 1), method="POST") as stream:
        assert stream.status == 413


async def test_invalid_json_body_is_answered_400() -> None:
    async def endpoint(request: Request) -> AsyncIterator[Any]:
        yield {"data": await request.json()}

    app = create_app({"/": endpoint})
    async with open_stream(app, method="POST", body=b'{"prompt": "hi"}') as stream:
        assert await read_data(stream) == ['{"prompt":"hi"}']
    for bad in (b"{", b"\xff", b"[" * 100_000):
        async with open_stream(app, method="POST", body=bad) as stream:
            assert stream.status == 400
            assert "not JSON" in await read_text(stream)


async def test_coroutine_endpoint_reads_the_body() -> None:
    async def endpoint(request: Request) -> Any:
        prompt = (await request.body()).decode()

        async def answer() -> AsyncIterator[str]:
            yield prompt

        return answer()

    app = in_pieces(create_app({"/": endpoint}), [b"a", b"b", b"c"], 1)
    async with open_stream(app, method="POST") as stream:
        assert await read_data(stream) == ["abc"]


async def test_body_raises_if_the_client_left() -> None:
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


async def test_disconnect_during_the_body_is_no_error_of_the_app() -> None:
    """The error tells the source of the disconnect, and does not reach the server's log."""
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


async def test_body_is_discarded_at_the_first_event() -> None:
    async def endpoint(request: Request) -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep(1)
        try:
            await request.body()
        except StreamClosedError as exc:
            yield str(exc)

    app = in_pieces(create_app({"/": endpoint}), [b"x" * 100_000] * 3, 0.1)
    async with open_stream(app, method="POST") as stream:
        assert "read it before" in str((await read_data(stream))[1])


async def test_unread_body_is_neither_buffered_nor_hides_the_disconnect() -> None:
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


async def test_large_body_that_was_read_does_not_hide_the_disconnect() -> None:
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
        assert await read_data(stream) == ["tick"]
    assert bodies == [b"ab", b"ab"]


async def test_task_reads_the_body_while_the_stream_waits_for_the_disconnect() -> None:
    """One task at a time calls `receive()`. The one that remains sees the disconnect."""
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


async def test_invalid_limit_is_refused() -> None:
    async def endpoint(request: Request) -> AsyncIterator[bytes]:
        yield await request.body(limit=-1)

    with pytest.raises(ValueError, match="limit must be an int of at least 0 bytes, got -1"):
        async with open_stream(create_app({"/": endpoint})):
            pass


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HTTPError(404, b"x"), TypeError, "detail must be a str, got b'x'"),  # type: ignore[arg-type]
        (lambda: HTTPError(99), ValueError, "status must be an int from 200 to 599, got 99"),
        (lambda: HTTPError("403"), ValueError, "status must be an int from 200 to 599, got '403'"),  # type: ignore[arg-type]
        (lambda: HTTPError(403, headers={"x": "a\nb"}), ValueError, "inject"),
    ],
)
def test_invalid_http_error_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()
