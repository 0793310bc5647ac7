"""`Heartbeat`: looks at each stream of an event loop when something of it is due."""

import heapq
import logging
import math
from functools import partial
from itertools import count
from typing import Final

from anyio.lowlevel import RunVar

from asgi_sse.errors import printable
from asgi_sse.stream.stream import Stream

from .base import EventLoop
from .current import current_loop

logger = logging.getLogger(__name__)

_VOID: Final = 64
"""Void entries from which on it is worth to look whether they are the most."""


class Heartbeat:
    """Looks at each stream of one event loop when the stream has asked for it.

    One timer serves all streams: it is set for the earliest time that any of them asked for (a later one
    that was set before goes off as well, and finds what it finds). A stream has one valid entry; what
    became void is left in the heap until its time comes, since a busy stream moves its next ping with
    every send.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._entries: list[tuple[float, int, list[Stream]]] = []
        self._void = 0
        self._numbers = count()
        self._timers: list[float] = []  # when those go off that are set

    def arm(self, stream: Stream, when: float) -> None:
        """Look at `stream` at `when`, or before."""
        if when < stream.check_at:
            self.forget(stream)
            stream.check_at = when
            stream.entry = [stream]
            heapq.heappush(self._entries, (when, next(self._numbers), stream.entry))
            self._set_timer()

    def forget(self, stream: Stream) -> None:
        """Let go of `stream`; its entry stays behind, empty."""
        if stream.entry:
            stream.entry.clear()
            self._void += 1
            if self._void > _VOID and self._void > len(self._entries) // 2:
                self._entries = [entry for entry in self._entries if entry[2]]
                heapq.heapify(self._entries)
                self._void = 0
        stream.check_at = math.inf

    def _set_timer(self) -> None:
        if self._entries and self._entries[0][0] < min(self._timers, default=math.inf):
            when = self._entries[0][0]
            self._timers.append(when)
            self._loop.call_at(when, partial(self._beat, when))

    def _beat(self, when: float) -> None:
        self._timers.remove(when)
        now = max(when, self._loop.time())  # asyncio may call early by the resolution of its clock
        due = []
        while self._entries and self._entries[0][0] <= now:
            entry = heapq.heappop(self._entries)[2]
            self._void -= not entry
            due += entry
        for stream in due:
            stream.entry = []
            stream.check_at = math.inf
            try:
                self.arm(stream, stream.tick())
            except Exception:
                logger.exception(
                    "the heartbeat of %r failed; the stream goes on without one",
                    stream,
                    extra={"sse_path": printable(stream.path)},
                )
        self._set_timer()


_heartbeat: RunVar[Heartbeat] = RunVar("asgi_sse heartbeat")


def current_heartbeat() -> Heartbeat:
    """The heartbeat of the event loop that the caller runs in."""
    try:
        return _heartbeat.get()
    except LookupError:
        heartbeat = Heartbeat(current_loop())
        _heartbeat.set(heartbeat)
        return heartbeat
