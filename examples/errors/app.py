"""Errors: a status of their own before the first event, a last event after it; and why each stream ended."""

import logging
from collections.abc import AsyncIterator
from itertools import count

import anyio

from asgi_sse import HTTPError, Request, ServerSentEvent, create_app

logging.basicConfig(level=logging.INFO)
logger = logging.getLogger("reports")

REPORTS = {"daily": 10**9, "broken": 3, "secret": 0}


async def report(request: Request) -> AsyncIterator[ServerSentEvent]:
    name = request.path_params["name"]
    if name not in REPORTS:
        raise HTTPError(404, f"there is no report {name!r}")
    if name == "secret":
        raise HTTPError(403, "this one is not for you")
    for number in count(1):
        if number > REPORTS[name]:
            raise ConnectionError("the database has gone")
        yield ServerSentEvent({"line": number}, id=number)
        await anyio.sleep(0.2)


def last_event(error: Exception) -> ServerSentEvent:
    return ServerSentEvent({"error": type(error).__name__}, event="failed")  # its text may not be for clients


def closed(reason: str) -> None:
    logger.info("a stream has ended: %s", reason)


app = create_app({"/reports/{name}": report}, on_error=last_event, on_close=closed)
