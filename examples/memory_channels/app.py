"""Memory streams of anyio as sources: many with one shared producer, and one with a producer of its own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import count

import anyio
from anyio.streams.memory import MemoryObjectSendStream
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from asgi_sse.adapters.sse_starlette import EventSourceResponse

subscribers: set[MemoryObjectSendStream[str]] = set()


async def broadcast() -> None:
    for number in count(1):
        for subscriber in list(subscribers):
            try:
                subscriber.send_nowait(f"news {number}")
            except anyio.WouldBlock:
                pass  # this client is too slow, and misses this event
            except anyio.BrokenResourceError:  # the client disconnected
                subscribers.remove(subscriber)
                subscriber.close()
        await anyio.sleep(0.2)


async def news(request: Request) -> EventSourceResponse:
    send, receive = anyio.create_memory_object_stream[str](max_buffer_size=10)
    subscribers.add(send)
    return EventSourceResponse(receive)


async def produce(send: MemoryObjectSendStream[str]) -> None:
    async with send:  # closing it ends the stream
        for number in range(3, 0, -1):
            await send.send(f"{number}")
            await anyio.sleep(0.2)


async def countdown(request: Request) -> EventSourceResponse:
    send, receive = anyio.create_memory_object_stream[str]()
    return EventSourceResponse(receive, data_sender_callable=partial(produce, send))


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(broadcast)
        yield
        tasks.cancel_scope.cancel()
    for subscriber in subscribers:
        subscriber.close()


app = Starlette(routes=[Route("/news", news), Route("/countdown", countdown)], lifespan=lifespan)
