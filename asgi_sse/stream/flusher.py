"""`Flusher`: once a loop turn, it runs the writers that have something to send, then a few waiting sources."""

from collections import deque
from typing import Final, Protocol

import anyio

from asgi_sse.runtime.base import EventLoop
from asgi_sse.runtime.current import LoopLocal

_SOURCES_PER_TURN: Final = 4
"""How many waiting sources continue in one loop turn. uvloop accepts one connection a turn. Without a limit, 200
sources at full speed kept a new client waiting for over 10 s; with 4 sources it waits 0.06 s."""

_LONG_ROUND_S: Final = 0.002
"""Seconds. After a round of flushing that took longer, the flusher rests for as long as the round took."""

_MAX_REST_S: Final = 0.02
"""Seconds of the longest rest. Events that become ready meanwhile leave in one message. Without rests, 200 events/s to
1,000 clients took a whole core, at 5.0 µs a delivery; with them 60 %, at 3.0 µs."""


class Flushed(Protocol):
    """A writer."""

    def flush(self) -> None:
        """Send what is ready. Never raises."""
        ...


class Flusher:
    """Runs once in each turn of its event loop in which there is something to do.

    It first flushes every marked writer, then lets a few waiting sources continue.
    """

    __slots__ = ("_dirty", "_loop", "_scheduled", "_waiting")

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._dirty: list[Flushed] = []
        self._waiting: deque[anyio.Event] = deque()
        self._scheduled = False

    def mark(self, writer: Flushed) -> None:
        """Flush `writer` in the next turn."""
        self._dirty.append(writer)
        self._schedule()

    def resume(self, waiting: anyio.Event) -> None:
        """Set `waiting`, which a source waits for, when the source's turn comes."""
        self._waiting.append(waiting)
        self._schedule()

    async def turn(self) -> None:
        """Wait until every writer that is marked now was flushed."""
        turn = anyio.Event()
        self.resume(turn)
        await turn.wait()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        dirty, self._dirty = self._dirty, []
        began = self._loop.time()
        for writer in dirty:
            writer.flush()
        took = self._loop.time() - began
        if took >= _LONG_ROUND_S and not (self._waiting or self._dirty):
            self._loop.call_at(began + took + min(took, _MAX_REST_S), self._go_on)
        else:
            for _ in range(min(_SOURCES_PER_TURN, len(self._waiting))):
                self._waiting.popleft().set()
            self._go_on()

    def _go_on(self) -> None:
        self._scheduled = False
        if self._dirty or self._waiting:
            self._schedule()


_flushers: Final = LoopLocal(Flusher)


def current_flusher() -> Flusher:
    """Return the flusher of the event loop that the caller runs in."""
    return _flushers.get()
