"""Streams that send a last event at shutdown, with `request.draining` or with an event as in sse-starlette."""

from collections.abc import AsyncIterator
from itertools import count

import anyio
from starlette.applications import Starlette
from starlette.requests import Request as StarletteRequest
from starlette.routing import Route

from asgi_sse import Request, ServerSentEvent, SSEMiddleware
from asgi_sse.adapters.sse_starlette import EventSourceResponse

FAREWELL = ServerSentEvent("the server restarts", event="farewell")


async def ticks(request: Request) -> AsyncIterator[ServerSentEvent]:
    for number in count(1):
        yield ServerSentEvent({"tick": number}, id=number)
        # Waits 0.2 seconds for the next event, or until the server shuts down.
        with anyio.move_on_after(0.2):
            await request.draining.wait()
            break
    yield FAREWELL


async def ticks_until(stopping: anyio.Event) -> AsyncIterator[ServerSentEvent]:
    for number in count(1):
        yield ServerSentEvent({"tick": number}, id=number)
        with anyio.move_on_after(0.2):
            await stopping.wait()
            break
    yield FAREWELL


async def adapter(request: StarletteRequest) -> EventSourceResponse:
    stopping = anyio.Event()  # the response sets it at shutdown, and then waits 2 seconds for the source
    return EventSourceResponse(ticks_until(stopping), shutdown_event=stopping, shutdown_grace_period=2)


app = SSEMiddleware(Starlette(routes=[Route("/adapter", adapter)]), routes={"/ticks": ticks})
