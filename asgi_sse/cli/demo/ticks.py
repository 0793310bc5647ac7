"""A reading every second, while anyone subscribes to it."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import anyio

from asgi_sse.broker import Broker
from asgi_sse.protocol.event import ServerSentEvent

_INTERVAL_S: Final = 1.0
_FIRST_INTERVAL_S: Final = 0.1
"""Time that the first reading covers: rates need two readings, and the client is waiting."""

_MAX_LOG_BYTES: Final = 256 * 1024
"""Memory for the events of an endless run: some minutes of them, for a page that was hidden."""


class Ticks:
    """Publishes a reading every second, as a run of the broker. It pauses while nobody subscribes.

    Args:
        broker: The broker of the run.
        channel: The name of the run, and the type of its events.
        read: Returns the current reading.
    """

    def __init__(self, broker: Broker, channel: str, read: Callable[[], dict[str, Any]]) -> None:
        self.channel = channel
        self._broker = broker
        self._read = read
        self._subscribed: anyio.Event | None = None  # only while the run pauses

    async def begin(self) -> None:
        """Start the run, unless it is running."""
        await self._broker.run(self.channel, self._source(), ttl=0, max_bytes=_MAX_LOG_BYTES, join=True)

    def update_count(self) -> None:
        """Continue a paused run if it has subscribers again."""
        if self._subscribed is not None and self._broker.subscribers(self.channel):
            self._subscribed.set()

    async def _source(self) -> AsyncIterator[ServerSentEvent]:
        while True:
            self._read()  # starts the interval of the first rates
            await anyio.sleep(_FIRST_INTERVAL_S)
            while self._broker.subscribers(self.channel):
                yield ServerSentEvent({**self._read(), "at": now_ms()}, event=self.channel)
                await anyio.sleep(_INTERVAL_S)
            self._subscribed = anyio.Event()
            await self._subscribed.wait()


def now_ms() -> int:
    """Return the milliseconds since 1970, as Date.now() does in browsers."""
    return round(time.time() * 1000)
