"""Errors: an HTTP status before the first event, a last event after it, and the reason why each stream ended."""

import logging
from collections.abc import AsyncIterator
from itertools import count

import anyio

from asgi_sse import HTTPError, Request, ServerSentEvent, create_app

logging.basicConfig(level=logging.INFO)
logger = logging.getLogger("reports")

REPORTS = {"daily": 10**9, "broken": 3, "secret": 0}  # lines until the report fails


async def report(request: Request) -> AsyncIterator[ServerSentEvent]:
    name = request.path_params["name"]
    if name not in REPORTS:
        # No event was sent yet, so the error becomes the status of the response.
        raise HTTPError(404, f"there is no report {name!r}")
    if name == "secret":
        raise HTTPError(403, "you may not read this report")
    for number in count(1):
        if number > REPORTS[name]:
            raise ConnectionError("the database is unavailable")
        yield ServerSentEvent({"line": number}, id=number)
        await anyio.sleep(0.2)


def last_event(error: Exception) -> ServerSentEvent:
    return ServerSentEvent({"error": type(error).__name__}, event="failed")  # not str(error), which may be confidential


def closed(reason: str) -> None:
    logger.info("stream ended: %s", reason)


app = create_app({"/reports/{name}": report}, on_error=last_event, on_close=closed)
