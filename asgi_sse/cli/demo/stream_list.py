"""The streams of this server, and why the last ones of them ended."""

from collections import deque
from typing import Any, Final

from asgi_sse.broker import Broker
from asgi_sse.stream.registry import StreamRegistry
from asgi_sse.stream.stream import Stream

_KEPT: Final = 30
"""Ended streams that are shown."""

_ALONE: Final = 4
"""Streams of one path that have a line each; more share one."""


class Roll:
    """Looks at a registry. What it tells has no addresses of clients.

    Args:
        registry: Whose streams.
        broker: On whose channel ``streams`` it says which of them have ended.
    """

    channel: Final = "streams"

    def __init__(self, registry: StreamRegistry, broker: Broker) -> None:
        self._registry = registry
        self._broker = broker
        self._ended: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        registry.when_ended(self._note)

    def _note(self, stream: Stream) -> None:
        ended = {**_line([stream]), "reason": stream.reason}
        self._ended.append(ended)
        self._broker.publish_nowait(self.channel, {"event": "ended", "data": ended})

    def read(self) -> dict[str, Any]:
        """The running streams, the oldest ones first, and the registry's figures."""
        by_path: dict[str, list[Stream]] = {}
        for stream in sorted(self._registry, key=lambda stream: -stream.age):
            by_path.setdefault(stream.path, []).append(stream)
        lines = []
        for streams in by_path.values():
            groups = [streams] if len(streams) > _ALONE else [[stream] for stream in streams]
            lines += [{**_line(group), "state": group[0].state} for group in groups]
        figures = self._registry.statistics()
        return {"lines": lines, "open": figures.open, "opened": figures.opened, "bytes": figures.bytes}

    def state(self) -> dict[str, Any]:
        """What who comes anew is shown."""
        return {**self.read(), "ended": list(self._ended)}


def _line(streams: list[Stream]) -> dict[str, Any]:
    """Streams of one path, the oldest one first."""
    return {
        "path": streams[0].path,
        "streams": len(streams),
        "age": round(streams[0].age, 1),
        "events": sum(stream.events for stream in streams),
        "bytes": sum(stream.bytes_sent for stream in streams),
    }
