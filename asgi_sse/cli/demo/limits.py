"""Limits on the requests of a page: from which origin they come, and how often."""

import time
from collections.abc import Awaitable, Callable
from math import ceil
from typing import Any

from asgi_sse.routing.request import HTTPError, Request


class RateLimit:
    """A limit on the number of requests: a burst, which refills over time.

    Args:
        burst: Requests that are allowed at once.
        per_second: Requests that are allowed again after each second.
    """

    def __init__(self, burst: int, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._left = float(burst)
        self._checked_at = time.monotonic()

    def take(self) -> None:
        """Count one request.

        Raises:
            HTTPError: 429, the limit is reached.
        """
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._checked_at) * self._per_second)
        self._checked_at = now
        if self._left < 1:
            seconds = ceil((1 - self._left) / self._per_second)
            raise HTTPError(429, f"too many requests; try again in {seconds} s", {"retry-after": str(seconds)})
        self._left -= 1


def page_command(do: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
    """Return an endpoint that accepts only POST, and refuses pages of other origins.

    Any page on the web can make a browser POST to this machine. No script can forge the headers in which the browser
    names the page's origin. Clients other than browsers can send anything, but no foreign page controls them.
    """

    async def answer(request: Request) -> Any:
        if request.method != "POST":
            raise HTTPError(405, headers={"allow": "POST"})
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if site is not None:
            allowed = site == "same-origin"
        else:  # browsers omit the header over plain HTTP from another machine, and old ones always do
            allowed = origin is None or origin.partition("://")[2] == request.headers.get("host")
        if not allowed:
            raise HTTPError(403, "pages of other origins may not send this request")
        return await do(request)

    return answer
