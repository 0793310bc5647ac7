"""`Drain`, which waits for streams that are asked to end, and `DrainReport`, its result."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import anyio

from asgi_sse.runtime.base import EventLoop

from .stream import Stream


@dataclass(frozen=True, slots=True)
class DrainReport:
    """The result of a drain: how the streams that were running at its start have ended.

    Attributes:
        finished: Streams that ended by themselves within their grace period.
        closed: Streams that the drain ended with a complete body.
        cancelled: Streams that were still running at the deadline and were cut.
        abandoned: Streams whose source was still running when the drain gave up.
        seconds: How long the drain took.
    """

    finished: int
    closed: int
    cancelled: int
    abandoned: int
    seconds: float


class Drain:
    """A drain in progress, waited for in one event loop. Its streams may run in other loops.

    Args:
        loop: The event loop of the caller of `wait`.
        streams: The streams that the drain waits for.
    """

    __slots__ = ("_emptied", "_loop", "_remaining", "_seconds", "_started")

    def __init__(self, loop: EventLoop, streams: Iterable[Stream]) -> None:
        self._loop = loop
        self._remaining = set(streams)
        self._emptied = anyio.Event()
        self._started = loop.time()
        self._seconds = math.nan

    def __contains__(self, stream: Stream) -> bool:
        return stream in self._remaining

    def discard(self, stream: Stream) -> None:
        """Wait for `stream` no longer, because it has ended. Safe from any thread."""
        if stream in self._remaining:
            self._remaining.discard(stream)
            if not self._remaining:
                self._loop.call_threadsafe(self._emptied.set)

    async def wait(self, seconds: float) -> None:
        """Wait until all streams have ended, for `seconds` at the most."""
        try:
            with anyio.move_on_after(seconds):
                if self._remaining:
                    await self._emptied.wait()
        finally:
            self._seconds = self._loop.time() - self._started

    def report(self, streams: list[Stream]) -> DrainReport:
        """Return how `streams` have ended, once `wait` has returned."""
        abandoned = {stream for stream in streams if stream in self._remaining or stream.abandoned}
        cancelled = sum(stream.forced and stream not in abandoned for stream in streams)
        finished = sum(stream.ended_itself and not stream.forced and stream not in abandoned for stream in streams)
        return DrainReport(
            finished=finished,
            closed=len(streams) - finished - cancelled - len(abandoned),
            cancelled=cancelled,
            abandoned=len(abandoned),
            seconds=self._seconds,
        )
