"""Two streams as users of each peer would write them: ``/gen``, flat out, and ``/idle``, one event and silence."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any


def raw() -> Any:
    """No library at all, and no more than an endless stream needs: its source, one send an event, and a watch.

    ``/gen`` gives the loop a turn after each send, without which nobody else would have one.
    """
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}

    async def watch(receive: Any, task: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send(start)
        watcher = asyncio.create_task(watch(receive, asyncio.current_task()))
        number = 0
        try:
            if scope["path"] == "/idle":
                async for event in idle():
                    body = f"data: {event['data']}\n\n".encode()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            while True:
                number += 1
                body = b'id: %d\ndata: {"token": "hello world %d"}\n\n' % (number, number)
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.sleep(0)
        finally:
            watcher.cancel()

    return app


async def gen() -> AsyncIterator[dict[str, Any]]:
    """Events as dicts, without ever waiting."""
    number = 0
    while True:
        number += 1
        yield {"id": str(number), "data": f'{{"token": "hello world {number}"}}'}


async def idle() -> AsyncIterator[dict[str, Any]]:
    """One event."""
    yield {"data": "first"}
    await asyncio.sleep(86_400)


def asgi_sse() -> Any:
    from asgi_sse import create_app  # noqa: PLC0415

    return create_app({"/gen": gen, "/idle": idle})


def sse_starlette() -> Any:
    from sse_starlette import EventSourceResponse  # noqa: PLC0415

    return on_starlette(EventSourceResponse)


def adapter() -> Any:
    """The same, with the import changed."""
    from asgi_sse.adapters.starlette import EventSourceResponse  # noqa: PLC0415

    return on_starlette(EventSourceResponse)


def on_starlette(response: Any) -> Any:
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    def endpoint(source: Any) -> Any:
        async def view(request: Any) -> Any:
            return response(source())

        return view

    return Starlette(routes=[Route("/gen", endpoint(gen)), Route("/idle", endpoint(idle))])


def fastapi() -> Any:
    from fastapi import FastAPI  # noqa: PLC0415
    from fastapi.sse import EventSourceResponse, ServerSentEvent  # noqa: PLC0415

    app = FastAPI()

    @app.get("/gen", response_class=EventSourceResponse)
    async def gen_view() -> AsyncIterator[ServerSentEvent]:
        async for event in gen():
            yield ServerSentEvent(raw_data=event["data"], id=event["id"])

    @app.get("/idle", response_class=EventSourceResponse)
    async def idle_view() -> AsyncIterator[ServerSentEvent]:
        async for event in idle():
            yield ServerSentEvent(raw_data=event["data"])

    return app


def litestar() -> Any:
    from litestar import Litestar, get  # noqa: PLC0415
    from litestar.response import ServerSentEvent  # noqa: PLC0415

    @get("/gen", sync_to_thread=False)
    def gen_view() -> ServerSentEvent:
        return ServerSentEvent(gen())

    @get("/idle", sync_to_thread=False)
    def idle_view() -> ServerSentEvent:
        return ServerSentEvent(idle())

    return Litestar([gen_view, idle_view])
