"""The app that the tests of servers run, in a process of its own."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio

from asgi_sse import EventSourceResponse, HTTPError, Request, ServerSentEvent, create_app

EVENTS = [
    ServerSentEvent("plain", id=1),
    ServerSentEvent("two\nlines\n", event="kind", id=2, retry=1234, comment="why"),
    ServerSentEvent("ünïcode ✓ \u2028 \x00", id="three"),
    ServerSentEvent({"json": [1, None, "x"]}),
    ServerSentEvent("x" * 200_000, id="large"),
    *(ServerSentEvent("burst", id=i) for i in range(2000)),
]
closed: list[str] = []


async def numbers() -> AsyncIterator[ServerSentEvent]:
    for number, event in enumerate(EVENTS):
        if number in (1, 3, 5):
            await anyio.sleep(0.02)
        yield event


def numbers_crlf(request: Request) -> EventSourceResponse:
    return EventSourceResponse(numbers(), sep="\r\n")


def threaded() -> Iterator[ServerSentEvent]:
    yield from EVENTS


async def idle(request: Request) -> AsyncIterator[str]:
    try:
        yield "first"
        await anyio.sleep_forever()
    finally:
        await anyio.sleep(0.01)
        closed.append(request.query["name"])


async def flat_out(request: Request) -> AsyncIterator[str]:
    try:
        while True:
            yield "x" * 1000
    finally:
        closed.append(request.query["name"])


async def closed_streams() -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent(closed)


async def reasons() -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent(dict(app.registry.statistics().closed))


async def echo(request: Request) -> AsyncIterator[str]:
    yield (await request.body(limit=100_000)).decode()


async def refuses() -> AsyncIterator[str]:
    await anyio.sleep(0.05)
    raise HTTPError(403, "not you")
    yield


async def breaks() -> AsyncIterator[str]:
    yield "just before"
    raise LookupError("late")


async def pings(request: Request) -> Any:
    async def source() -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep_forever()

    return EventSourceResponse(source(), ping=0.1)


async def backlog() -> AsyncIterator[bytes]:
    """20 MB that a client has missed."""
    event = ServerSentEvent("x" * 990).encode()
    for _ in range(20_000):
        yield event


def threaded_idle() -> Iterator[str]:
    yield "first"
    yield "second"
    threading.Event().wait(0.05)
    yield "third"


async def figures() -> AsyncIterator[ServerSentEvent]:
    gc.collect()
    sources = (idle, backlog, threaded_idle)
    codes = {source.__code__ for source in sources}
    frames = (getattr(o, "ag_code", None) or getattr(o, "gi_code", None) for o in gc.get_objects())
    yield ServerSentEvent(
        {
            "streams": len(app.registry),
            "tasks": len(asyncio.all_tasks()),
            "threads": threading.active_count(),
            "generators": sum(code in codes for code in frames),
            "closed": dict(app.registry.statistics().closed),
        }
    )


app = create_app(
    {
        "/backlog": backlog,
        "/threaded-idle": threaded_idle,
        "/figures": figures,
        "/numbers": numbers,
        "/crlf": numbers_crlf,
        "/threaded": threaded,
        "/idle": idle,
        "/flat-out": flat_out,
        "/closed": closed_streams,
        "/reasons": reasons,
        "/echo": echo,
        "/refuses": refuses,
        "/breaks": breaks,
        "/pings": pings,
    },
    send_timeout=2,
)
