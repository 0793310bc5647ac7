"""Routes: which endpoint answers a path, and which patterns are invalid."""

import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from stream_reading import read_data, read_text

from asgi_sse import Request, create_app
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


async def ticks() -> AsyncIterator[str]:
    yield "tick"


async def test_literal_segment_takes_precedence_over_parameter() -> None:
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
            assert await read_data(stream) == [expected]
    for path in ["/users", "/users//events", "/users/ann/events/", "/nope", "//"]:
        async with open_stream(app, path) as stream:
            assert stream.status == 404
            assert await read_text(stream) == "Not Found"


async def test_root_path_is_no_part_of_the_route() -> None:
    async def show_path(request: Request) -> AsyncIterator[str]:
        yield request.path

    app = create_app({"/events": show_path, "/": show_path})
    for root, path, expected in [
        ("/api", "/api/events", "/events"),
        ("/api", "/events", "/events"),  # some servers leave the prefix out of the path
        ("/events", "/events", "/"),
        ("/events", "/events/", "/"),
        ("/api/", "/api/events", "/events"),
        ("", "/events", "/events"),
    ]:
        async with open_stream(app, path, scope={"root_path": root}) as stream:
            assert await read_data(stream) == [expected], (root, path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
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
        (lambda: create_app({"/a/<int:id>": ticks}), ValueError, "such as '/{name}', got '<int:id>'"),
        (lambda: create_app([("/", ticks)]), TypeError, "routes must be a mapping, got [('/', "),  # type: ignore[arg-type]
        (lambda: create_app({"/{id:int}": ticks}), ValueError, "there are no converters"),
        (lambda: create_app({"/a?b=1": ticks}), ValueError, "query"),
    ],
)
def test_invalid_route_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()
