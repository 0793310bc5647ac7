"""`create_app`: its options, its lifespan, and what it answers besides streams."""

import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from asgi_lifespan import LifespanManager
from stream_reading import read_data, read_text

from asgi_sse import EventSourceResponse, Request, StreamRegistry, create_app
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


async def ticks() -> AsyncIterator[str]:
    yield "tick"


async def test_defaults_apply_to_options_that_a_response_leaves_out() -> None:
    async def idle() -> AsyncIterator[str]:
        await anyio.sleep(10)
        yield "x"

    async def with_own_ping(request: Request) -> EventSourceResponse:
        return EventSourceResponse(idle(), ping=0)

    async def with_built_in_values(request: Request) -> EventSourceResponse:
        return EventSourceResponse(idle(), ping=15, retry=3000, max_lifetime=None)

    registry = StreamRegistry()
    app = create_app(
        {"/": idle, "/own": with_own_ping, "/built-in": with_built_in_values},
        ping=4,
        retry=7,
        max_lifetime=13,
        registry=registry,
    )
    async with open_stream(app, "/built-in") as stream:
        assert await read_text(stream) == ": stream opened\nretry: 3000\n\ndata: x\n\n"
    async with open_stream(app) as stream:
        assert await read_text(stream) == ": stream opened\nretry: 7\n\n: ping\n\n: ping\n\ndata: x\n\n"
    async with open_stream(app, "/own") as stream:
        assert await read_text(stream) == ": stream opened\nretry: 7\n\ndata: x\n\n"
    assert app.registry is registry
    assert registry.statistics().opened == 3


async def test_app_can_run_twice() -> None:
    app = create_app({"/": ticks})
    async with LifespanManager(app):
        assert not app.registry.draining
    assert not app.registry.draining
    async with LifespanManager(app):
        assert not app.registry.draining
        async with open_stream(app) as stream:
            assert await read_data(stream) == ["tick"]


async def test_websocket_is_refused() -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    await create_app({"/": ticks})({"type": "websocket", "path": "/"}, None, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1000}]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: create_app({}, pong=5), TypeError, "unknown option 'pong'; the options are routes, broker, "),  # type: ignore[call-arg]
        (lambda: create_app({}, ping=-5), ValueError, "ping must be at least 0 or None, got -5"),
        (lambda: create_app({}, drain_timeout=3), TypeError, "registry=StreamRegistry(drain_timeout=3)"),  # type: ignore[call-arg]
        (lambda: create_app({}, drain_retry=(1, 2)), TypeError, "registry=StreamRegistry(drain_retry=(1, 2))"),  # type: ignore[call-arg]
        (lambda: create_app({}, registry=True), TypeError, "registry must be a StreamRegistry, got True"),  # type: ignore[arg-type]
    ],
)
def test_invalid_option_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()
