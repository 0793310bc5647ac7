"""What streams have done, counted: `StreamCounters`, `RegistryStatistics` and the totals of a process."""

import threading
import weakref
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Generic, TypeVar

from asgi_sse.protocol.asgi import CloseReason

T = TypeVar("T")

DURATION_BOUNDS_S: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
"""Bounds of the histogram of stream durations. They separate a client that fails at once, a stream that a proxy cuts
after 15 s or 60 s, a page that is closed soon, and a page that stays open for a day."""

_FIRST_CLEANUP: Final = 64
"""Registered owners at which `ProcessTotals` first looks for collected ones."""


@dataclass
class StreamCounters:
    """Counts of streams. A count never decreases. Servers in several threads may share one instance.

    Each field is also a field of `RegistryStatistics`, so a new count is added to both. A signal handler may count
    while the thread that it interrupted is counting. The lock is therefore reentrant, and each count is updated by one
    ``+=`` that calls no Python function: CPython runs handlers only between calls and at the end of a loop's turn.
    """

    opened: int = 0
    closed: dict[CloseReason, int] = field(default_factory=lambda: defaultdict(int))
    events: int = 0
    bytes: int = 0
    drains: int = 0
    compressed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: float = 0.0
    durations: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BOUNDS_S) + 1))
    _lock: threading.RLock = field(init=False, default_factory=threading.RLock, repr=False, compare=False)

    def count_opened(self) -> None:
        """Count a stream that has begun."""
        with self._lock:
            self.opened += 1

    def count_closed(self, reason: CloseReason, seconds: float, events: int, size: int) -> None:
        """Count a stream that has ended.

        Args:
            reason: Why the stream ended.
            seconds: How long it lasted.
            events: How many events it took from its source.
            size: Bytes of body handed to the server.
        """
        with self._lock:
            self.closed[reason] += 1
            self.events += events
            self.bytes += size
            self.seconds += seconds
            self.durations[bisect_left(DURATION_BOUNDS_S, seconds)] += 1

    def count_drain(self) -> None:
        """Count a drain of one or more streams."""
        with self._lock:
            self.drains += 1

    def count_compressed(self, kind: str) -> None:
        """Count a stream that a middleware has ``"encoded"``, ``"held"`` or ``"buffered"``."""
        with self._lock:
            self.compressed[kind] += 1

    def add(self, other: "StreamCounters") -> None:
        """Add the counts of `other`, while no other thread changes them."""
        values = vars(self)
        with other._lock:  # noqa: SLF001 (of this class)
            for name, counted in other.snapshot().items():
                if isinstance(counted, dict):
                    for key, number in counted.items():
                        values[name][key] += number
                elif isinstance(counted, tuple):
                    for index, number in enumerate(counted):
                        values[name][index] += number
                else:
                    values[name] += counted

    def snapshot(self) -> dict[str, Any]:
        """Return copies of all counts by field name, as `RegistryStatistics` takes them."""
        copies: dict[str, Any] = {}
        with self._lock:
            for name in _COUNTS:
                value = getattr(self, name)
                copies[name] = (
                    dict(value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
                )
        return copies


_COUNTS: Final = tuple(item.name for item in fields(StreamCounters) if item.init)


@dataclass(frozen=True, slots=True)
class RegistryStatistics:
    """The state of a registry, and what its streams have done since it was created.

    Attributes:
        open: Streams running now.
        opened: Streams ever begun.
        closed: Streams that have ended, by reason.
        abandoned: Abandoned sources that still run.
        events: Events that streams have taken from their sources.
        bytes: Bytes of body handed to the server.
        longest_wait: Seconds for which the slowest client has not taken its current message.
        drains: Drains of at least one stream that have ended.
        compressed: Streams that a middleware has ``encoded``, ``held`` or ``buffered``, by which of these.
        seconds: The summed duration of all streams that have ended.
        durations: How many of those streams fall into each interval of `counters.DURATION_BOUNDS_S`. The last number
            counts the streams that lasted longer than every bound.
        draining: Whether the registry is draining.
    """

    open: int
    opened: int
    closed: Mapping[CloseReason, int]
    abandoned: int
    events: int
    bytes: int
    longest_wait: float
    drains: int
    compressed: Mapping[str, int]
    seconds: float
    durations: Sequence[int]
    draining: bool


class ProcessTotals(Generic[T]):
    """The counters of all registries of this process, including those of registries that no longer exist.

    Owners are held weakly. Without the totals of collected owners, every event loop that ends would take the counts of
    its default registry with it. The sum over all registries would then decrease, which a monitoring system reads as a
    restart of the process.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant, as that of `StreamCounters`
        self._known: dict[weakref.ref[T], StreamCounters] = {}
        self._collected = StreamCounters()
        self._cleanup_at = _FIRST_CLEANUP

    def register(self, owner: T, counters: StreamCounters) -> None:
        """Include the counters of `owner` from now on. Safe from any thread."""
        with self._lock:
            if len(self._known) >= self._cleanup_at:
                self._living()
                self._cleanup_at = 2 * len(self._known) + _FIRST_CLEANUP
            self._known[weakref.ref(owner)] = counters

    def read(self) -> tuple[list[T], StreamCounters]:
        """Return the living owners, and the total of the collected ones. Safe from any thread."""
        collected = StreamCounters()
        with self._lock:
            living = self._living()
            collected.add(self._collected)
        return living, collected

    def _living(self) -> list[T]:
        living: list[T] = []
        for reference in list(self._known):
            owner = reference()
            if owner is not None:
                living.append(owner)
            elif (counters := self._known.pop(reference, None)) is not None:  # a signal handler may have popped it
                self._collected.add(counters)
        return living
