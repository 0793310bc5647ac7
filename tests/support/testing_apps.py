"""Apps for the tests of `asgi_sse.testing`."""

from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import anyio

from asgi_sse import Request, SSEMiddleware, create_app

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}

closed: list[str] = []
"""The paths of the requests whose source has cleaned up."""


async def ticks(request: Request) -> AsyncIterator[dict[str, Any]]:
    """Yield one event a second, starting after the client's Last-Event-ID."""
    try:
        for number in count(int(request.last_event_id or 0) + 1):
            yield {"data": {"n": number}, "event": "tick", "id": number}
            await anyio.sleep(1)
    finally:
        closed.append(request.path)


async def three() -> AsyncIterator[dict[str, Any]]:
    for number in (1, 2, 3):
        yield {"data": str(number), "id": number}


async def fails() -> AsyncIterator[str]:
    yield "first"
    await anyio.sleep(1)
    raise TimeoutError("the database")


async def echo(request: Request) -> AsyncIterator[str]:
    yield f"{request.headers['content-type']} {await request.json()}"


def make_app(**options: Any) -> SSEMiddleware:
    return create_app({"/ticks": ticks, "/three": three, "/fails": fails, "/echo": echo}, **options)


def plain_app(*messages: dict[str, Any]) -> Any:
    """Return an app that sends these messages, each a body message unless it says otherwise."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send({"type": "http.response.body", **message})

    return app
