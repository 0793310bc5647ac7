"""Without a framework: endpoints of `create_app`, and an ASGI app that sends a stream by itself."""

from collections.abc import AsyncIterator, Iterator
from itertools import count
from time import sleep
from typing import Any

import anyio

from asgi_sse import EventSourceResponse, Request, ServerSentEvent, create_app


async def ticks() -> AsyncIterator[ServerSentEvent]:
    for number in count(1):
        yield ServerSentEvent({"tick": number}, event="tick", id=number)
        await anyio.sleep(0.2)


def countdown(request: Request) -> Iterator[str]:
    """Run in a thread, because this generator is not async: it may block."""
    for number in range(3, 0, -1):
        yield f"{request.path_params['name']}: {number}"
        sleep(0.2)


async def by_hand(scope: Any, receive: Any, send: Any) -> None:
    # A response is an ASGI app: call it with the arguments of yours.
    await EventSourceResponse(ticks(), headers={"x-made": "by hand"})(scope, receive, send)


app = create_app({"/ticks": ticks, "/countdown/{name}": countdown, "/by-hand": by_hand})
