"""The app that test_proxies.py puts behind a proxy: channels, tokens by POST, and a silent stream."""

from collections.abc import AsyncIterator

import anyio

from asgi_sse import Broker, EventSourceResponse, HTTPError, Request, ServerSentEvent, create_app

broker = Broker()


async def publish(request: Request) -> None:
    await broker.publish(request.path_params["channel"], (await request.body()).decode())
    raise HTTPError(204)


async def subscribers(request: Request) -> AsyncIterator[int]:
    yield broker.subscribers(request.path_params["channel"])


async def answer(request: Request) -> AsyncIterator[str]:
    for word in (await request.body()).decode().split():
        yield word
    yield "[DONE]"


async def one_event() -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent("the only event", id=1)
    await anyio.sleep_forever()


async def long_event() -> AsyncIterator[str]:
    yield "long " * 1000
    await anyio.sleep_forever()


async def replay() -> EventSourceResponse:
    """Start the body with a long event, like a long replay: Caddy compresses if its first read has 512 bytes."""
    return EventSourceResponse(long_event(), opening_comment=False, retry=None)


async def silent(request: Request) -> EventSourceResponse:
    return EventSourceResponse(one_event(), ping=float(request.query["ping"]))


app = create_app(
    {
        "/events": answer,
        "/events/silent": silent,
        "/events/replay": replay,
        "/events/answer": answer,
        "/events/of/{channel}": broker.endpoint(),
        "/publish/{channel}": publish,
        "/subscribers/{channel}": subscribers,
    },
    broker=broker,
)
