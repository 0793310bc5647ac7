"""Sources for the tests of the drop-in for sse-starlette, and readers of their bodies."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio

from asgi_sse.testing import open_stream


async def items(*values: Any) -> AsyncIterator[Any]:
    for value in values:
        yield value


async def forever(first: Any = "first", on_end: Callable[[], Any] = lambda: None) -> AsyncIterator[Any]:
    """Yield one event and wait until the client has left."""
    try:
        yield first
        await anyio.sleep_forever()
    finally:
        on_end()


async def body_of(response: Any, **request: Any) -> bytes:
    """Return the whole body of the response."""
    async with open_stream(response, **request) as stream:
        body = b""
        while chunk := await stream.read(timeout=100_000):
            body += chunk
        assert stream.complete
    return body


async def read_to_end(stream: Any) -> bytes:
    """Return the rest of the body, which has to end properly."""
    body = b""
    while chunk := await stream.read(timeout=60):
        body += chunk
    assert stream.complete
    return body
