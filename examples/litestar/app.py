"""A stream from a Litestar handler, and one from a plain ASGI callable among the handlers."""

from collections.abc import AsyncIterator
from itertools import count
from typing import Annotated, Any

import anyio
from litestar import Litestar, asgi, get
from litestar.params import Parameter

from asgi_sse import EventSourceResponse as PlainResponse
from asgi_sse import ServerSentEvent
from asgi_sse.adapters.litestar import EventSourceResponse


async def multiples(step: int) -> AsyncIterator[ServerSentEvent]:
    for number in count(1):
        yield ServerSentEvent({"multiple": number * step}, id=number)
        await anyio.sleep(0.2)


# Recommended: parameters, dependencies, guards and cookies work as in any other handler.
@get("/multiples")
async def returned(step: Annotated[int, Parameter(ge=1, le=100)] = 1) -> EventSourceResponse:
    return EventSourceResponse(multiples(step))


# For a callable that also runs under other frameworks: it only gets what ASGI provides.
@asgi("/plain", copy_scope=True)
async def plain(scope: Any, receive: Any, send: Any) -> None:
    await PlainResponse(multiples(1))(scope, receive, send)


app = Litestar([returned, plain])
