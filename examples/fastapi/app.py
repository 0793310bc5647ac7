"""A stream from a FastAPI path operation, with a typed query parameter and a dependency."""

from collections.abc import AsyncIterator
from itertools import count
from typing import Annotated

import anyio
from fastapi import Depends, FastAPI, Header, Query

from asgi_sse.adapters.sse_starlette import EventSourceResponse, JSONServerSentEvent

app = FastAPI()


def last_seen(last_event_id: Annotated[int, Header(ge=0, le=10**9)] = 0) -> int:
    """Return the id of the last event that a reconnecting client received, or 0."""
    return last_event_id


async def multiples(step: int, seen: int) -> AsyncIterator[JSONServerSentEvent]:
    for number in count(seen + 1):
        yield JSONServerSentEvent({"multiple": number * step}, id=number)
        await anyio.sleep(0.2)


@app.get("/multiples")
async def stream(
    seen: Annotated[int, Depends(last_seen)], step: Annotated[int, Query(ge=1, le=100)] = 1
) -> EventSourceResponse:
    """Stream the multiples of a number without end."""
    return EventSourceResponse(multiples(step, seen))
