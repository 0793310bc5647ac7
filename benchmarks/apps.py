"""The apps of the peers, as their users would write them. Each has the same paths.

- ``/gen``: a stream whose source never waits.
- ``/idle``: a stream with one event and then silence.
- ``/news``: a subscription to the events of ``/publish``. Most peers use an unbounded `asyncio.Queue` per subscriber.
- ``/streams``: the number of running streams and subscribers. Only some peers have this path.
"""

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl


def raw() -> Any:
    return Raw()


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
PING = float(os.environ.get("BENCHMARKS_PING", "15"))  # seconds between keep-alives, for peers that have them


def counts(streams: int | None, subscribers: int, query: str) -> dict[str, int | None]:
    """Return the JSON object of ``/streams``.

    With ``?blocks``, it is the number of memory blocks that Python has allocated, after a garbage collection.
    """
    if query == "blocks":
        gc.collect()
        return {"blocks": sys.getallocatedblocks()}
    return {"streams": streams, "subscribers": subscribers}


def answering(streams: Callable[[], int], subscribers: Callable[[], int]) -> Any:
    """Return an ASGI app for ``/streams``."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        body = json.dumps(counts(streams(), subscribers(), scope["query_string"].decode())).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})

    return answer


class Raw:
    """An app without a library: a source, one send per event, and a task that watches for the disconnect.

    ``/gen`` yields to the event loop after each send, or no other task would run. ``/news`` encodes each event once
    for all subscribers.
    """

    def __init__(self) -> None:
        self.news = Topic()
        self.running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["path"] == "/publish":
            start_publishing(dict(parse_qsl(scope["query_string"].decode())), self.publish)
            await send(START)
            await send({"type": "http.response.body"})
            return
        if scope["path"] == "/streams":
            await answering(lambda: self.running, lambda: len(self.news.queues))(scope, receive, send)
            return
        queue = self.news.join() if scope["path"] == "/news" else None
        self.running += 1
        await send(START)
        watcher = asyncio.create_task(self.watch(receive, asyncio.current_task()))
        number = 0
        try:
            while queue is not None:
                body = await queue.get()
                await send({"type": "http.response.body", "body": body, "more_body": True})
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
            self.running -= 1
            watcher.cancel()
            self.news.queues.discard(queue)

    async def watch(self, receive: Any, task: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    def publish(self, number: int, data: str) -> None:
        self.news.publish(f"id: {number}\ndata: {data}\n\n".encode())


async def gen() -> AsyncIterator[dict[str, Any]]:
    """Yield events as dicts without ever waiting."""
    number = 0
    while True:
        number += 1
        yield {"id": str(number), "data": f'{{"token": "hello world {number}"}}'}


async def idle() -> AsyncIterator[dict[str, Any]]:
    """Yield one event, then wait for a day."""
    yield {"data": "first"}
    await asyncio.sleep(86_400)


class Topic:
    """A queue for each subscriber, as users write it without a broker."""

    def __init__(self) -> None:
        self.queues: set[Any] = set()

    def join(self) -> Any:
        queue: Any = asyncio.Queue()
        self.queues.add(queue)
        return queue

    def publish(self, event: Any) -> None:
        for queue in self.queues:
            queue.put_nowait(event)

    def subscribe(self) -> AsyncIterator[Any]:
        queue = self.join()  # join now, or events published before the first step of the generator are lost

        async def events() -> AsyncIterator[Any]:
            try:
                while True:
                    yield await queue.get()
            finally:
                self.queues.discard(queue)

        return events()

    def publish_dict(self, number: int, data: str) -> None:
        self.publish({"id": str(number), "data": data})


publishers: set[Any] = set()


def start_publishing(query: Mapping[str, str], publish: Callable[[int, str], object]) -> None:
    task = asyncio.create_task(
        publishing(publish, int(query["count"]), float(query["rate"]), "x" * int(query.get("pad", "0")))
    )
    publishers.add(task)
    task.add_done_callback(publishers.discard)


async def publishing(publish: Callable[[int, str], object], count: int, rate: float, pad: str) -> None:
    """Publish events with the time of publishing.

    Args:
        publish: Receives the event's number and data.
        count: Number of events.
        rate: Events a second; 0 publishes all at once. Late events are published without waiting.
        pad: Text that makes each event longer.
    """
    began = time.monotonic()
    for number in range(1, count + 1):
        if rate and (early := began + number / rate - time.monotonic()) > 0:
            await asyncio.sleep(early)
        publish(number, f'{{"number": {number}, "sent": {time.monotonic_ns()}, "pad": "{pad}"}}')


def asgi_sse() -> Any:
    from asgi_sse import Broker, EventSourceResponse, Request, create_app  # noqa: PLC0415

    broker = Broker()
    news = broker.channel("news")

    async def publish(request: Request) -> EventSourceResponse:
        start_publishing(dict(request.query), lambda _, data: news.publish_nowait(data))
        return EventSourceResponse([])

    streams = answering(lambda: len(app.registry), lambda: broker.subscribers("news"))
    app = create_app({"/gen": gen, "/idle": idle, "/news": news, "/publish": publish, "/streams": streams}, ping=PING)
    return app


def sse_starlette() -> Any:
    from sse_starlette import EventSourceResponse  # noqa: PLC0415

    return on_starlette(EventSourceResponse)


def adapter() -> Any:
    """Return the same app, with only the import changed."""
    from asgi_sse.adapters.sse_starlette import EventSourceResponse  # noqa: PLC0415

    return on_starlette(EventSourceResponse)


def on_starlette(response: Any) -> Any:
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.responses import JSONResponse, Response  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    def endpoint(source: Any) -> Any:
        async def view(request: Any) -> Any:
            return response(source(), ping=PING)

        return view

    async def publish(request: Any) -> Any:
        start_publishing(request.query_params, news.publish_dict)
        return Response()

    async def streams(request: Any) -> Any:
        return JSONResponse(
            counts(None, len(news.queues), request.url.query)
        )  # sse-starlette does not count its streams

    news = Topic()
    sources = {"/gen": gen, "/idle": idle, "/news": news.subscribe}
    return Starlette(
        routes=[
            *(Route(path, endpoint(source)) for path, source in sources.items()),
            Route("/publish", publish),
            Route("/streams", streams),
        ]
    )


def fastapi() -> Any:
    from fastapi import FastAPI, Request  # noqa: PLC0415
    from fastapi.sse import EventSourceResponse, ServerSentEvent  # noqa: PLC0415

    app = FastAPI()
    news = Topic()

    @app.get("/gen", response_class=EventSourceResponse)
    async def gen_view() -> AsyncIterator[ServerSentEvent]:
        async for event in gen():
            yield ServerSentEvent(raw_data=event["data"], id=event["id"])

    @app.get("/idle", response_class=EventSourceResponse)
    async def idle_view() -> AsyncIterator[ServerSentEvent]:
        async for event in idle():
            yield ServerSentEvent(raw_data=event["data"])

    @app.get("/news", response_class=EventSourceResponse)
    async def news_view() -> AsyncIterator[ServerSentEvent]:
        async for event in news.subscribe():
            yield event

    @app.get("/publish")
    async def publish_view(request: Request) -> None:
        start_publishing(
            request.query_params,
            lambda number, data: news.publish(ServerSentEvent(raw_data=data, id=str(number))),
        )

    return app


def litestar() -> Any:
    from litestar import Litestar, Request, get  # noqa: PLC0415
    from litestar.response import ServerSentEvent  # noqa: PLC0415

    news = Topic()

    @get("/gen", sync_to_thread=False)
    def gen_view() -> ServerSentEvent:
        return ServerSentEvent(gen())

    @get("/idle", sync_to_thread=False)
    def idle_view() -> ServerSentEvent:
        return ServerSentEvent(idle())

    @get("/news", sync_to_thread=False)
    def news_view() -> ServerSentEvent:
        return ServerSentEvent(news.subscribe())

    @get("/publish")
    async def publish_view(request: Request[Any, Any, Any]) -> None:
        start_publishing(request.query_params, news.publish_dict)

    return Litestar([gen_view, idle_view, news_view, publish_view])
