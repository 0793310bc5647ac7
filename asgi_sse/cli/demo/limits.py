"""What a request from a page may ask for: from where, how much, and how often."""

import time
from collections.abc import Awaitable, Callable
from math import ceil
from typing import Any

from asgi_sse.routing.request import HTTPError, Request


class Allowance:
    """So many at once, and so many a second after that.

    Args:
        burst: How many at once.
        per_second: How many more each second.
    """

    def __init__(self, burst: int, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._left = float(burst)
        self._at = time.monotonic()

    def take(self) -> None:
        """Use one of them.

        Raises:
            HTTPError: 429, there is none left.
        """
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            seconds = ceil((1 - self._left) / self._per_second)
            raise HTTPError(429, f"too often; again in {seconds} s", {"retry-after": str(seconds)})
        self._left -= 1


def command(do: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
    """An endpoint that does something: by POST, and not from the pages of other sites.

    Any page of the web can have a browser send a POST to this machine. What a browser says of where it comes from,
    no script can change; what is no browser says nothing, and could say anything.
    """

    async def answer(request: Request) -> Any:
        if request.method != "POST":
            raise HTTPError(405, headers={"allow": "POST"})
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if site is not None:
            allowed = site == "same-origin"
        else:  # over plain HTTP from another machine, or an old browser
            allowed = origin is None or origin.partition("://")[2] == request.headers.get("host")
        if not allowed:
            raise HTTPError(403, "a page of another origin may not ask for this")
        return await do(request)

    return answer
