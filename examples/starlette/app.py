"""A stream from a Starlette endpoint. A client that reconnects continues after the last event that it received."""

from collections.abc import AsyncIterator
from itertools import count

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from asgi_sse import EventSourceResponse, ServerSentEvent, SSEMiddleware


async def count_from(first: int) -> AsyncIterator[ServerSentEvent]:
    for number in count(first):
        yield ServerSentEvent({"number": number}, event="number", id=number)
        await anyio.sleep(0.2)


async def numbers(request: Request) -> EventSourceResponse:
    last = request.headers.get("last-event-id", "0")
    if not last.isdecimal() or len(last) > 9:  # any client can send any header
        raise HTTPException(400, "Last-Event-ID must be an id of this stream")
    return EventSourceResponse(count_from(int(last) + 1))


# Streams also work without the middleware. It sets the defaults of all streams, and prevents that another middleware
# compresses them.
app = SSEMiddleware(Starlette(routes=[Route("/numbers", numbers)]), ping=10, max_lifetime=3600)
