"""The app that test_hostile_http.py attacks, in a process of its own."""

import gc
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio

from asgi_sse import (
    Broker,
    HTTPError,
    InvalidEventError,
    JSONServerSentEvent,
    Request,
    ServerSentEvent,
    create_app,
)
from asgi_sse.routing.cors import CORS

broker = Broker(history=100, max_bytes=1_000_000, max_channels=1000, max_subscribers=1000)
crowded = Broker(max_subscribers=2)
closed: dict[str, int] = {}


async def publish(request: Request) -> None:
    await broker.publish("healthy", request.query.get("data", ""))
    raise HTTPError(204)


async def bomb(request: Request) -> None:
    await broker.publish("bombs", "x" * int(request.query["bytes"]))
    raise HTTPError(204)


async def echo(request: Request) -> AsyncIterator[bytes]:
    yield ServerSentEvent(str(len(await request.body(limit=100_000)))).encode()


async def echo_json(request: Request) -> AsyncIterator[ServerSentEvent]:
    yield JSONServerSentEvent(await request.json())


async def item(request: Request) -> AsyncIterator[ServerSentEvent]:
    yield JSONServerSentEvent([request.path_params["name"], request.path])


async def seen(request: Request) -> AsyncIterator[ServerSentEvent]:
    """Read every part of the request that an app may read."""
    yield JSONServerSentEvent(
        {
            "id": request.last_event_id,
            "query": dict(request.query),
            "cookies": len(request.cookies),
            "headers": len(request.headers),
        }
    )


async def inject(request: Request) -> AsyncIterator[ServerSentEvent]:
    """Put client data into any field, as a careless app does."""
    query = request.query
    try:
        if "header" in query:
            raise HTTPError(302, query.get("detail", ""), {"location": query["header"]})
        if "detail" in query:
            raise HTTPError(400, query["detail"])
        fields: dict[str, Any] = {name: query[name] for name in ("id", "event", "comment", "retry") if name in query}
        yield ServerSentEvent(query.get("data", "harmless"), **fields)
    except (InvalidEventError, ValueError):
        raise HTTPError(422) from None


async def flood(request: Request) -> AsyncIterator[str]:
    try:
        while True:
            yield "x" * 1000
    finally:
        closed["flood"] = closed.get("flood", 0) + 1


async def hang(request: Request) -> Any:
    await anyio.sleep_forever()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def figures() -> AsyncIterator[ServerSentEvent]:
    gc.collect()
    yield JSONServerSentEvent(
        {
            "bytes": resident(),
            "streams": len(app.registry),
            "closed": closed,
            "readers": broker.statistics().subscriptions,
        }
    )


app = create_app(
    {
        "/healthy": broker.channel("healthy"),
        "/publish": publish,
        "/bomb": bomb,
        "/bombs": broker.channel("bombs"),
        "/echo": echo,
        "/json": echo_json,
        "/items/{name}": item,
        "/seen": seen,
        "/inject": inject,
        "/flood": flood,
        "/events": broker.endpoint(),
        "/events/{channel}": broker.endpoint(),
        "/granted": broker.endpoint(authorize=lambda _: ["**"]),
        "/hangs": broker.endpoint("healthy", snapshot=hang),
        "/crowded": crowded.channel("crowded"),
        "/figures": figures,
    },
    broker=broker,
    send_timeout=1,
    cors=CORS(lambda _: True, credentials=True),
)
