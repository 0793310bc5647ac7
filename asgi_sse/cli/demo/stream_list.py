"""The open streams of this server, and why the latest ended ones ended."""

from collections import deque
from typing import Any, Final

from asgi_sse.broker import Broker
from asgi_sse.stream.registry import StreamRegistry
from asgi_sse.stream.stream import Stream

_MAX_ENDED: Final = 30
"""Ended streams to show."""

_MAX_ROWS_PER_PATH: Final = 4
"""Streams of one path that get a row each. If there are more, they share one row."""


class StreamList:
    """Lists the streams of a registry, without the addresses of their clients.

    Args:
        registry: The registry.
        broker: The broker of the channel ``streams``, on which the list publishes each stream that ended.
    """

    channel: Final = "streams"

    def __init__(self, registry: StreamRegistry, broker: Broker) -> None:
        self._registry = registry
        self._broker = broker
        self._ended: deque[dict[str, Any]] = deque(maxlen=_MAX_ENDED)
        registry.when_ended(self._add_ended)

    def _add_ended(self, stream: Stream) -> None:
        ended = {**_row([stream]), "reason": stream.reason}
        self._ended.append(ended)
        self._broker.publish_nowait(self.channel, {"event": "ended", "data": ended})

    def read(self) -> dict[str, Any]:
        """Return the open streams, the oldest first, and the registry's counters."""
        by_path: dict[str, list[Stream]] = {}
        for stream in sorted(self._registry, key=lambda stream: -stream.age):
            by_path.setdefault(stream.path, []).append(stream)
        rows = []
        for streams in by_path.values():
            groups = [streams] if len(streams) > _MAX_ROWS_PER_PATH else [[stream] for stream in streams]
            rows += [{**_row(group), "state": group[0].state} for group in groups]
        counters = self._registry.statistics()
        return {"rows": rows, "open": counters.open, "opened": counters.opened, "bytes": counters.bytes}

    def state(self) -> dict[str, Any]:
        """Return what a new tab shows."""
        return {**self.read(), "ended": list(self._ended)}


def _row(streams: list[Stream]) -> dict[str, Any]:
    """Return the row of one or more streams of the same path, the oldest first."""
    return {
        "path": streams[0].path,
        "streams": len(streams),
        "age": round(streams[0].age, 1),
        "events": sum(stream.events for stream in streams),
        "bytes": sum(stream.bytes_sent for stream in streams),
    }
