"""The running streams: their heartbeat, their figures, and their end when the server stops."""

import heapq
import logging
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final

import anyio
from anyio.lowlevel import RunVar

from ._eventloop import EventLoop, current_loop
from ._types import CloseReason
from .stream import Stream

logger = logging.getLogger(__name__)

_AFTER_DEADLINE: Final = 2.5
"""Seconds past its deadline for which `drain` waits for streams that it has cancelled by then: one each for the end of
a body that nobody takes and for the server to report the end of its connection."""

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
                logger.exception("the heartbeat of %r failed; the stream goes on without one", stream)
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


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What became of the streams that were running when a drain began.

    Attributes:
        finished: Ended by themselves, as those that said farewell within their grace.
        closed: Ended by the drain, with a complete body.
        cancelled: Still running at the deadline, and cut.
        abandoned: Their sources had not come to an end when the drain gave up.
        seconds: How long the drain took.
    """

    finished: int
    closed: int
    cancelled: int
    abandoned: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RegistryStatistics:
    """Figures of a registry, since it was made.

    Attributes:
        open: Streams running now.
        opened: Streams ever begun.
        closed: Streams ended, by reason.
        abandoned: Sources left behind that still run.
        events: Items that sources have given.
        bytes: Bytes of body handed to the server.
        longest_wait: Seconds for which the slowest client has not taken its message.
    """

    open: int
    opened: int
    closed: Mapping[CloseReason, int]
    abandoned: int
    events: int
    bytes: int
    longest_wait: float


class StreamRegistry:
    """The running streams of one app, and how they end when its server stops.

    Iterating gives the running streams, ``len()`` counts them.

    Args:
        drain_timeout: Seconds that streams have to end when the server stops.
        drain_retry: The range in milliseconds of which each client is told a random value, so that
            they do not all come back at once.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(self, *, drain_timeout: float = 10.0, drain_retry: tuple[int, int] = (1000, 5000)) -> None:
        if isinstance(drain_timeout, bool) or not isinstance(drain_timeout, int | float) or not drain_timeout >= 0:
            raise ValueError(f"drain_timeout={drain_timeout!r} is no length of time; give seconds of at least 0")
        low, high = drain_retry
        if not (isinstance(low, int) and isinstance(high, int) and 0 <= low <= high):
            raise ValueError(f"drain_retry={drain_retry!r} is no range; give two whole milliseconds, the lower first")
        self._drain_timeout = drain_timeout
        self._drain_retry = (low, high)
        self._streams: dict[Stream, Heartbeat] = {}
        self._abandoned: set[Stream] = set()  # kept, or asyncio could collect a task that still runs
        self._draining = False
        self._drain_within = drain_timeout
        self._emptied: dict[anyio.Event, EventLoop] = {}
        self._opened = 0
        self._closed: dict[CloseReason, int] = {}
        self._events = 0
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams))

    @property
    def draining(self) -> bool:
        """Whether the server is stopping: streams that come now are told to return later."""
        return self._draining

    def statistics(self) -> RegistryStatistics:
        """The figures as of now."""
        running = list(self)
        return RegistryStatistics(
            open=len(running),
            opened=self._opened,
            closed=dict(self._closed),
            abandoned=len(self._abandoned),
            events=self._events + sum(stream.events for stream in running),
            bytes=self._bytes + sum(stream.bytes_sent for stream in running),
            longest_wait=max((stream.waiting for stream in running), default=0.0),
        )

    def farewell_retry(self) -> int:
        """A reconnection time in milliseconds, at random out of the range."""
        return random.randint(*self._drain_retry)  # noqa: S311 (it spreads load, it guards nothing)

    def begin_drain(self) -> None:
        """Ask every stream to end; give those that watch ``Request.draining`` time for it.

        Safe from any thread, and from a callback of a signal handler. Idempotent.
        """
        self._begin_drain(self._drain_timeout)

    async def drain(self, timeout: float | None = None) -> DrainReport:
        """End every stream, and wait for it.

        Args:
            timeout: Seconds for it; ``None``: ``drain_timeout``.

        Returns:
            What became of the streams.
        """
        loop = current_loop()
        began = loop.time()
        within = self._drain_timeout if timeout is None else timeout
        streams = list(self)
        self._begin_drain(within)
        with anyio.move_on_after(within + _AFTER_DEADLINE):
            while self._streams:
                emptied = anyio.Event()
                self._emptied[emptied] = loop
                await emptied.wait()
        abandoned = sum(stream in self._streams or stream.abandoned for stream in streams)
        cancelled = sum(stream.forced and not (stream in self._streams or stream.abandoned) for stream in streams)
        finished = sum(stream.ended_itself and not stream.forced for stream in streams)
        report = DrainReport(
            finished=finished,
            closed=len(streams) - finished - cancelled - abandoned,
            cancelled=cancelled,
            abandoned=abandoned,
            seconds=loop.time() - began,
        )
        if streams:
            logger.info("drained %d streams: %s", len(streams), report)
        return report

    def _begin_drain(self, within: float) -> None:
        self._drain_within = within
        self._draining = True
        for stream in self:  # one that is draining already keeps its deadline, if that is earlier
            stream.loop.call_threadsafe(partial(self._drain_stream, stream))

    def _drain_stream(self, stream: Stream) -> None:
        stream.drain(self.farewell_retry(), stream.loop.time() + self._drain_within)

    def reopen(self) -> None:
        """A server starts with this registry: what an earlier one left is over."""
        self._draining = False

    # What a stream needs (stream.Keeper)

    def add(self, stream: Stream) -> None:
        """See `stream.Keeper`."""
        self._streams[stream] = current_heartbeat()
        self._opened += 1
        if self._draining:  # by another thread, since the response looked
            self._drain_stream(stream)

    def arm(self, stream: Stream, when: float) -> None:
        """See `stream.Keeper`."""
        heartbeat = self._streams.get(stream)
        if heartbeat is not None:
            heartbeat.arm(stream, when)

    def discard(self, stream: Stream) -> None:
        """See `stream.Keeper`."""
        if stream.abandoned:
            self._abandoned.add(stream)
        else:
            self._abandoned.discard(stream)
        heartbeat = self._streams.pop(stream, None)
        if heartbeat is None:
            return
        heartbeat.forget(stream)
        reason: CloseReason = stream.reason or "disconnected"
        self._closed[reason] = self._closed.get(reason, 0) + 1
        self._events += stream.events
        self._bytes += stream.bytes_sent
        if not self._streams:
            for emptied, loop in self._emptied.items():
                loop.call_threadsafe(emptied.set)
            self._emptied.clear()


_default: RunVar[StreamRegistry] = RunVar("asgi_sse default registry")


def default_registry() -> StreamRegistry:
    """The registry of streams that were given none, in the running event loop. One that has drained is replaced."""
    registry = _default.get(None)
    if registry is None or (registry.draining and not len(registry)):
        registry = StreamRegistry()
        _default.set(registry)
    return registry
