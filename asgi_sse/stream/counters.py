"""`StreamCounters`: what has become of streams, counted; and `ProcessTotals`, which keeps the count of who is gone."""

import threading
import weakref
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from asgi_sse.protocol.asgi import CloseReason

T = TypeVar("T")

DURATIONS: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
"""Seconds by which the lifetimes of streams are told apart: of a client that fails at once, of one that a proxy cuts
after 15 s or 60 s, of a page that is left soon, of one that is open for a day."""


@dataclass(slots=True)
class StreamCounters:
    """Counts of streams, none of which ever goes down. Servers in several threads may count in one.

    Attributes:
        opened: Streams begun.
        closed: Streams ended, by reason.
        events: Items that the sources of those had given.
        bytes: Bytes of their bodies.
        drains: Drains that have ended, of streams of which there was at least one.
        compressed: Streams that a middleware has encoded, held or buffered, by which.
        seconds: For which those that have ended had lasted, all together.
        durations: How many of them lasted no longer than each of `DURATIONS`, and than the one before it less; the last
            one: longer than all.
    """

    opened: int = 0
    closed: dict[CloseReason, int] = field(default_factory=dict)
    events: int = 0
    bytes: int = 0
    drains: int = 0
    compressed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    durations: list[int] = field(default_factory=lambda: [0] * (len(DURATIONS) + 1))
    # Reentrant, since a handler of a signal may end streams while its thread counts.
    _lock: threading.RLock = field(init=False, default_factory=threading.RLock, repr=False, compare=False)

    def began(self) -> None:
        """A stream has begun."""
        with self._lock:
            self.opened += 1

    def ended(self, reason: CloseReason, seconds: float, events: int, size: int) -> None:
        """A stream has ended."""
        with self._lock:
            self.closed[reason] = self.closed.get(reason, 0) + 1
            self.events += events
            self.bytes += size
            self.seconds += seconds
            self.durations[bisect_left(DURATIONS, seconds)] += 1

    def drained(self) -> None:
        """A drain has ended."""
        with self._lock:
            self.drains += 1

    def was_compressed(self, kind: str) -> None:
        """A middleware has encoded, held or buffered a stream."""
        with self._lock:
            self.compressed[kind] = self.compressed.get(kind, 0) + 1

    def add(self, other: "StreamCounters") -> None:
        """Count what `other` has counted as well, as of one moment, whichever thread counts there."""
        with other._lock:  # noqa: SLF001 (of this class)
            self.opened += other.opened
            self.events += other.events
            self.bytes += other.bytes
            self.drains += other.drains
            self.seconds += other.seconds
            for reason, number in list(other.closed.items()):  # a handler of a signal may count in between
                self.closed[reason] = self.closed.get(reason, 0) + number
            for kind, number in list(other.compressed.items()):
                self.compressed[kind] = self.compressed.get(kind, 0) + number
            self.durations = [one + two for one, two in zip(self.durations, other.durations, strict=True)]


class ProcessTotals(Generic[T]):
    """Who counts in this process, held weakly; what somebody has counted who is gone counts on.

    Without that, each event loop that ends would take the count of its default registry with it, and a sum over all
    would go down, which a monitoring system takes for a process that has begun anew.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # as a `StreamCounters` has one
        self._known: dict[weakref.ref[T], StreamCounters] = {}
        self._gone = StreamCounters()
        self._bound = 64  # entries from which on it is worth to look who is gone

    def enter(self, owner: T, counters: StreamCounters) -> None:
        """`owner` counts in `counters` from now on. From any thread."""
        with self._lock:
            if len(self._known) >= self._bound:
                self._fold()
                self._bound = 2 * len(self._known) + 64
            self._known[weakref.ref(owner)] = counters

    def take(self) -> tuple[list[T], StreamCounters]:
        """Those who are there, and a copy of what the others had counted. From any thread."""
        gone = StreamCounters()
        with self._lock:
            present = self._fold()
            gone.add(self._gone)
        return present, gone

    def _fold(self) -> list[T]:
        present: list[T] = []
        for reference in list(self._known):
            owner = reference()
            if owner is not None:
                present.append(owner)
            elif (counters := self._known.pop(reference, None)) is not None:  # else a handler of a signal was faster
                self._gone.add(counters)
        return present
