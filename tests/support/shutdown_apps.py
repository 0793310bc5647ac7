"""Apps with endless streams for the shutdown tests. Each writes what happens to it into a file."""

import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.routing import Route

from asgi_sse import EventSourceResponse, Request, ServerSentEvent, SSEMiddleware, StreamRegistry

# uvicorn's reload supervisor does not import this module. All workers write to one file.
_LOG = os.environ.get("SHUTDOWN_LOG", os.devnull)


def note(what: str) -> None:
    with Path(_LOG).open("a") as log:
        log.write(f"{what}\n")


async def ticks() -> AsyncIterator[ServerSentEvent]:
    try:
        for number in count():
            yield ServerSentEvent(f"tick {number}", id=number)
            await anyio.sleep(0.05)
    finally:
        await anyio.sleep(0.01)
        note("finally")


async def idle() -> AsyncIterator[str]:
    try:
        yield "first"
        await anyio.sleep_forever()
    finally:
        note("finally")


async def flat_out() -> AsyncIterator[str]:
    try:
        while True:
            yield "x" * 1000
    finally:
        note("finally")


async def swallows_once() -> AsyncIterator[str]:
    try:
        yield "first"
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        await anyio.sleep(0.2)
        yield "more"
    finally:
        note("finally")


async def swallows_for_ever() -> AsyncIterator[str]:
    yield "first"
    while True:
        with suppress(BaseException):
            await anyio.sleep(0.1)


async def slow_clean_up() -> AsyncIterator[str]:
    try:
        yield "first"
        await anyio.sleep_forever()
    finally:
        note("finally")
        await anyio.sleep(5)
        note("too late")


def blocked_thread() -> Iterator[str]:
    yield "first"
    threading.Event().wait(60)
    yield "never"


async def farewell(request: Request) -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent("first")
    await request.draining.wait()
    await anyio.sleep(0.1)
    note("finally")
    yield ServerSentEvent("farewell", event="farewell")


SOURCES: dict[str, Any] = {
    "/ticks": ticks,
    "/idle": idle,
    "/flat-out": flat_out,
    "/swallows-once": swallows_once,
    "/swallows-for-ever": swallows_for_ever,
    "/slow-clean-up": slow_clean_up,
    "/blocked-thread": blocked_thread,
    "/farewell": farewell,
}


async def with_a_lifespan(scope: Any, receive: Any, send: Any) -> None:
    """Answer ``/ticks`` with a bare response, and note the lifespan's shutdown."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        note("lifespan.shutdown")
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["path"] == "/ticks":
        await EventSourceResponse(ticks())(scope, receive, send)
    else:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


async def raises_on_lifespan(scope: Any, receive: Any, send: Any) -> None:
    """Raise on the lifespan scope, like Django."""
    if scope["type"] == "lifespan":
        raise ValueError("this app can only handle HTTP")
    await with_a_lifespan(scope, receive, send)


async def _starlette_ticks(request: Any) -> Any:
    return EventSourceResponse(ticks())


async def long_farewell(request: Request) -> AsyncIterator[str]:
    yield "first"
    await request.draining.wait()
    await anyio.sleep(60)


long_drain = SSEMiddleware(
    with_a_lifespan, {"/long-farewell": long_farewell}, registry=StreamRegistry(drain_timeout=60)
)
bare = with_a_lifespan
no_lifespan = raises_on_lifespan
starlette = Starlette(routes=[Route("/ticks", _starlette_ticks)])
app = SSEMiddleware(with_a_lifespan, SOURCES)
hasty = SSEMiddleware(with_a_lifespan, SOURCES, registry=StreamRegistry(drain_timeout=1))


def __getattr__(name: str) -> Any:
    """Make the same stream with sse-starlette, which only the full matrix installs."""
    if name != "sse_starlette":
        raise AttributeError(name)
    from sse_starlette import EventSourceResponse as Peer

    async def endpoint(request: Any) -> Any:
        return Peer(idle())

    return Starlette(routes=[Route("/idle", endpoint)])


def embedded(how: str, port: int) -> None:
    """Serve `app` from inside a program until a line arrives on the standard input."""
    import uvicorn

    if how == "hypercorn":
        import asyncio

        from hypercorn.asyncio import serve
        from hypercorn.config import Config

        async def line() -> None:
            await asyncio.to_thread(sys.stdin.readline)

        config = Config()
        config.bind = [f"127.0.0.1:{port}"]
        asyncio.run(serve(app, config, shutdown_trigger=line))  # type: ignore[arg-type]
        return
    server = uvicorn.Server(uvicorn.Config(app, port=port))
    if how == "thread":
        thread = threading.Thread(target=server.run)
        thread.start()
        sys.stdin.readline()
        server.should_exit = True
        thread.join()
    else:

        def stop() -> None:
            sys.stdin.readline()
            server.should_exit = True

        threading.Thread(target=stop, daemon=True).start()
        server.run()


if __name__ == "__main__":
    embedded(sys.argv[1], int(sys.argv[2]))
