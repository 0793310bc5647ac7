"""Sources and helpers for tests of `EventSourceResponse`."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel

from asgi_sse import (
    EventSourceResponse,
)
from asgi_sse.testing import open_stream

OPENING = b": stream opened\nretry: 3000\n\n"


async def items(*values: Any) -> AsyncIterator[Any]:
    for value in values:
        yield value


async def forever() -> AsyncIterator[Any]:
    await anyio.sleep_forever()
    yield


class Reasons(list[str]):
    """Collects the reasons that `on_close` receives."""

    def __call__(self, reason: str) -> None:
        self.append(reason)


async def body_of(response: EventSourceResponse, **request: Any) -> bytes:
    async with open_stream(response, **request) as stream:
        body = b""
        while chunk := await stream.read(timeout=100_000):
            body += chunk
        assert stream.complete
    return body
