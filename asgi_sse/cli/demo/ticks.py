"""What is looked at each second, while somebody wants to know."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import anyio

from asgi_sse.broker import Broker
from asgi_sse.protocol.event import ServerSentEvent

_INTERVAL: Final = 1.0
_FIRST_INTERVAL: Final = 0.1
"""Seconds that the first figures are measured over: rates need two looks, and the client is waiting."""

_BYTES: Final = 256 * 1024
"""Memory for the events, of which there is no end: some minutes of them, for a page that was hidden."""


class Ticks:
    """A run that publishes what `read` gives, once a second, and rests while nobody reads it.

    Args:
        broker: Whose run it is.
        channel: Its name, and the type of its events.
        read: Gives the figures as of now.
    """

    def __init__(self, broker: Broker, channel: str, read: Callable[[], dict[str, Any]]) -> None:
        self.channel = channel
        self._broker = broker
        self._read = read
        self._wanted: anyio.Event | None = None  # while it rests

    async def begin(self) -> None:
        """Begin, unless it goes on."""
        await self._broker.run(self.channel, self._source(), ttl=0, max_bytes=_BYTES, join=True)

    def recount(self) -> None:
        """Somebody came or left."""
        if self._wanted is not None and self._broker.subscribers(self.channel):
            self._wanted.set()

    async def _source(self) -> AsyncIterator[ServerSentEvent]:
        while True:
            self._read()  # for rates since now
            await anyio.sleep(_FIRST_INTERVAL)
            while self._broker.subscribers(self.channel):
                yield ServerSentEvent({**self._read(), "at": now()}, event=self.channel)
                await anyio.sleep(_INTERVAL)
            self._wanted = anyio.Event()
            await self._wanted.wait()


def now() -> int:
    """Milliseconds since 1970, as browsers count them."""
    return round(time.time() * 1000)
