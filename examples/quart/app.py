"""A stream from a Quart view. Its source can use the request."""

from collections.abc import AsyncIterator
from itertools import count

import anyio
from quart import Quart, request

from asgi_sse import ServerSentEvent, SSEMiddleware
from asgi_sse.adapters.quart import EventSourceResponse

app = Quart(__name__)
app.asgi_app = SSEMiddleware(app.asgi_app)  # ends the streams when the server shuts down


async def greetings() -> AsyncIterator[ServerSentEvent]:
    for number in count(1):
        yield ServerSentEvent(f"Hello {request.args.get('name', 'you')}", id=number)
        await anyio.sleep(0.2)


@app.get("/greetings")
async def stream() -> EventSourceResponse:
    return EventSourceResponse(greetings())
