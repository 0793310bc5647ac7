"""Benchmarks of single steps of the hot path, without a server."""

import asyncio
import time
import timeit
from collections.abc import Callable
from typing import Any

from .results import Outcome, Sample
from .sizes import Size


def micro(peers: list[str], size: Size) -> Outcome:
    from asgi_sse import EventDecoder, ServerSentEvent  # noqa: PLC0415
    from asgi_sse.protocol.event import encode_item  # noqa: PLC0415

    event = ServerSentEvent('{"token": "hello world 123"}', id="123")
    item = {"data": '{"token": "hello world 123"}', "id": "123"}
    stream = event.encode() * 10_000
    outcome = Outcome()
    if "asgi_sse" not in peers:
        return outcome

    def rate(function: Callable[[], Any], number: int, events: int = 1) -> float:
        return min(timeit.repeat(function, number=number, repeat=size.repeats)) / number / events * 1e6

    figures = {
        "encode us": rate(event.encode, 100_000),
        "build+encode us": rate(lambda: ServerSentEvent('{"token": "hello world 123"}', id="123").encode(), 100_000),
        "item: dict us": rate(lambda: encode_item(item), 100_000),
        "item: str us": rate(lambda: encode_item("hello world"), 100_000),
        "decode us": rate(lambda: EventDecoder().feed(stream), 3, 10_000),
        "overhead us": overhead(size.repeats),
    }
    outcome.add("asgi_sse", [Sample(figures)])
    return outcome


def overhead(repeats: int) -> float:
    """Return the microseconds that `SSEMiddleware` adds to a response that is not an event stream."""
    from asgi_sse import SSEMiddleware  # noqa: PLC0415

    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
    end = {"type": "http.response.body", "body": b"x"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(start)
        await send(end)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    async def seconds(app: Any, number: int = 20_000) -> float:
        headers = [(b"host", b"x"), (b"accept", b"*/*"), (b"accept-encoding", b"gzip"), (b"user-agent", b"x")]
        scopes = [{"type": "http", "method": "GET", "path": "/page", "headers": headers} for _ in range(number)]
        began = time.perf_counter()
        for scope in scopes:
            await app(scope, receive, send)
        return (time.perf_counter() - began) / number

    async def main() -> float:
        wrapped = SSEMiddleware(app, {"/events": app})
        best = float("inf"), float("inf")
        for _ in range(repeats):  # alternate, so that a slow moment does not hit only one of the two
            best = min(best[0], await seconds(wrapped)), min(best[1], await seconds(app))
        return (best[0] - best[1]) * 1e6

    return asyncio.run(main())
