"""The app that test_eventsource.py runs in a process of its own."""

import os
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio

from asgi_sse import (
    CORS,
    Broker,
    EventSourceResponse,
    HTTPError,
    Request,
    ServerSentEvent,
    SSEMiddleware,
    StreamRegistry,
    Subscription,
    create_app,
)
from asgi_sse.runtime.server import abort_transport

OTHER = os.environ["OTHER_ORIGIN"]
ODD_IDS = ["0f3e-1", "a b", "~_:/@+=,-", "\u00e9\u2713", '"quoted"', "%41"]

registry = StreamRegistry(drain_retry=(300, 900))
broker = Broker(history=5)
requests: list[dict[str, Any]] = []


async def blank_page(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"text/html")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"<!doctype html><link rel=icon href=data:,><title>test</title>"})


async def kinds() -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent("plain")
    yield ServerSentEvent("two\nlines\n", event="kind", id="1", comment="why")
    yield ServerSentEvent("\u00fcn\u00efcode \u2713 \u2028 <b>", event="kind", id="two")
    yield ServerSentEvent({"json": [1, None, "x"]})
    await anyio.sleep_forever()


async def numbers(last: str | None) -> AsyncIterator[ServerSentEvent]:
    for number in range(int(last or 0) + 1, 301):
        yield ServerSentEvent("x" * (number % 50), id=number)
        if number % 10 == 0:
            await anyio.sleep(0.001)
    await anyio.sleep_forever()


async def cut(scope: Any, receive: Any, send: Any) -> None:
    """Stream numbers; cut each of the first five connections within an event."""
    last = next((value.decode() for name, value in scope["headers"] if name == b"last-event-id"), None)
    attempt = sum(request["path"] == scope["path"] for request in requests)
    left = 400 * attempt + 7 if attempt <= 5 else 10**9

    async def send_some(message: Any) -> None:
        nonlocal left
        body = message.get("body", b"")
        if len(body) >= left:
            await send({**message, "body": body[:left], "more_body": True})
            while not abort_when_written(send):
                await anyio.sleep(0.001)
            await anyio.sleep_forever()
        left -= len(body)
        await send(message)

    await EventSourceResponse(numbers(last), retry=20, registry=registry)(scope, receive, send_some)


def abort_when_written(send: Any) -> bool:
    """Cut the connection if the write buffer is empty: an abort would drop its content."""
    transport = send.__self__.transport
    return transport.get_write_buffer_size() == 0 and abort_transport(send)


def ends(request: Request) -> EventSourceResponse:
    return EventSourceResponse(["x"], retry=int(request.query["retry"]))


async def idle() -> AsyncIterator[str]:
    yield "x"
    await anyio.sleep_forever()


def odd_ids(request: Request) -> Any:
    """Send one event with the next id and end; after the last id answer 204."""
    last = request.last_event_id
    position = 0 if last is None else ODD_IDS.index(last) + 1
    if position == len(ODD_IDS):
        raise HTTPError(204)
    return EventSourceResponse([ServerSentEvent("x", id=ODD_IDS[position])], retry=20)


async def drain(request: Request) -> None:
    """End all streams, then publish events while the clients are disconnected."""
    registry.end(registry)
    while len(registry):
        await anyio.sleep(0.001)
    for number in range(int(request.query.get("publish", "0"))):
        broker.publish_nowait("small", str(number))
    raise HTTPError(204)


async def publish(request: Request) -> None:
    raise HTTPError(200, await broker.publish("small", request.query["data"]))


def small(request: Request) -> Subscription:
    return broker.subscribe("small", last_event_id=request.last_event_id)


async def run(request: Request) -> None:
    async def words() -> AsyncIterator[str]:
        for word in ("one", "two", "three"):
            yield word

    await (await broker.run("words", words())).wait()
    raise HTTPError(204)


async def requested() -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent(requests)


def cookie(request: Request) -> EventSourceResponse:
    return EventSourceResponse([request.cookies.get("user", "nobody")], retry=60_000)


streams = SSEMiddleware(
    blank_page,
    {
        "/kinds": kinds,
        "/ends": ends,
        "/idle": idle,
        "/odd": odd_ids,
        "/small": small,
        "/drain": drain,
        "/publish": publish,
        "/run": run,
        "/words": broker.endpoint("words", runs=True),
        "/requests": requested,
    },
    registry=registry,
    broker=broker,
    retry=150,
)
APPS: dict[str, Any] = {
    "cut": cut,  # not inside the middleware: it needs the server's own send to cut the connection
    "allowed": create_app(
        {"/allowed/small": small, "/allowed/odd": odd_ids, "/allowed/cookie": cookie}, registry=registry, cors=OTHER
    ),
    "credentials": create_app({"/credentials/cookie": cookie}, registry=registry, cors=CORS([OTHER], credentials=True)),
    "refused": create_app({"/refused/small": small}, registry=registry, cors=["https://example.com"]),
}


async def app(scope: Any, receive: Any, send: Any) -> None:
    path = scope.get("path", "")
    if scope["type"] == "http":
        last = [value.decode() for name, value in scope["headers"] if name == b"last-event-id"]
        requests.append(
            {
                "path": path,
                "query": scope["query_string"].decode(),
                "method": scope["method"],
                "id": last[0] if last else None,
                "at": time.monotonic(),
            }
        )
    await APPS.get(path[1:].partition("/")[0], streams)(scope, receive, send)
