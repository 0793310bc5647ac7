"""What test_proxies.py serves behind a proxy: channels, tokens by POST, and a stream that says nothing."""

from collections.abc import AsyncIterator

import anyio

from asgi_sse import Broker, EventSourceResponse, HTTPError, Request, ServerSentEvent, create_app

broker = Broker()


async def publish(request: Request) -> None:
    await broker.publish(request.path_params["channel"], (await request.body()).decode())
    raise HTTPError(204)


async def readers(request: Request) -> AsyncIterator[int]:
    yield broker.subscribers(request.path_params["channel"])


async def answer(request: Request) -> AsyncIterator[str]:
    for word in (await request.body()).decode().split():
        yield word
    yield "[DONE]"


async def silence() -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent("that is all", id=1)
    await anyio.sleep_forever()


async def long() -> AsyncIterator[str]:
    yield "long " * 1000
    await anyio.sleep_forever()


async def replay() -> EventSourceResponse:
    """A body that begins with much, as a long replay may: Caddy compresses where its first read has 512 bytes."""
    return EventSourceResponse(long(), opening_comment=False, retry=None)


async def quiet(request: Request) -> EventSourceResponse:
    return EventSourceResponse(silence(), ping=float(request.query["ping"]))


app = create_app(
    {
        "/events": answer,
        "/events/quiet": quiet,
        "/events/replay": replay,
        "/events/answer": answer,
        "/events/of/{channel}": broker.endpoint(),
        "/publish/{channel}": publish,
        "/readers/{channel}": readers,
    },
    broker=broker,
)
