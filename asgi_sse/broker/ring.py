"""`Ring`: the newest events of one channel; and `Sequence`: the events of all channels, ordered by offset."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from asgi_sse.protocol.event import ServerSentEvent

_ENTRY_BYTES: Final = 350
"""Memory of an event beside its data: objects, offsets and list slots. Measured on Python 3.12."""

_MIN_HOLES: Final = 1000
"""A sequence is compacted once it has more holes than this, and more holes than events."""

_MIN_DROPPED: Final = 64
"""A ring is compacted once it has more dropped events than this, and more dropped events than others."""


@dataclass(slots=True, eq=False)
class Entry:
    """One event of the log.

    Attributes:
        offset: The position in the sequence of all channels.
        channel: The name of the channel.
        event: The event, with its id.
        chunk: The encoded event.
        time: When the event was appended, in seconds of the clock of the process that appended it.
        end: On the last event of a run: how the run ended. ``None`` on any other event.
    """

    offset: int
    channel: str
    event: ServerSentEvent
    chunk: bytes
    time: float
    end: str | None = None


class Sequence:
    """The entries of all channels ordered by offset, for subscribers of many channels.

    Attributes:
        valid: Whether the sequence is in use. If not, it does nothing until `make` fills it.
    """

    __slots__ = ("_entries", "_holes", "_offsets", "valid")

    def __init__(self) -> None:
        self.valid: bool = True
        self._offsets: list[int] = []
        self._entries: list[Entry | None] = []  # None for a dropped entry
        self._holes = 0

    def make(self, entries: Iterable[Entry]) -> None:
        """Fill the sequence with `entries`, which may be in any order."""
        ordered = sorted(entries, key=attrgetter("offset"))
        self._offsets = [entry.offset for entry in ordered]
        self._entries = list(ordered)
        self._holes = 0
        self.valid = True

    def append(self, entry: Entry) -> None:
        """Add the newest entry."""
        if self.valid:
            self._offsets.append(entry.offset)
            self._entries.append(entry)

    def drop(self, offset: int) -> None:
        """Drop the entry at `offset`."""
        if not self.valid:
            return
        self._entries[bisect_left(self._offsets, offset)] = None
        self._holes += 1
        if self._holes > _MIN_HOLES and self._holes > len(self._offsets) // 2:
            self._entries = [entry for entry in self._entries if entry is not None]
            self._offsets = [entry.offset for entry in self._entries if entry is not None]
            self._holes = 0

    def after(self, offset: int) -> Iterator[Entry]:
        """Return the entries after `offset`."""
        first = bisect_right(self._offsets, offset)
        return filter(None, map(self._entries.__getitem__, range(first, len(self._entries))))


class Ring:
    """The events that the log still has of one channel, oldest first.

    Args:
        trimmed: See below.
        sequence: The sequence of all channels.
        history: See below.
        max_bytes: See below.
        max_age: See below.

    Attributes:
        trimmed: The offset of the last event that was dropped. Nothing is known about earlier events.
        whole: Whether this process has, or had, all events that the log on the server has of the channel.
        size: The memory that the events take, about, in bytes.
        history: How many events are kept.
        max_bytes: How many bytes of memory are kept. The newest event is kept whatever its size is.
        max_age: For how many seconds events are kept.
    """

    __slots__ = (
        "_entries", "_memo", "_offsets", "_sequence", "_start", "history", "max_age", "max_bytes", "size", "trimmed",
        "whole",
    )  # fmt: skip

    def __init__(self, trimmed: int, sequence: Sequence, *, history: float, max_bytes: int, max_age: float) -> None:
        self.trimmed: int = trimmed
        self.whole: bool = False
        self.history: float = history
        self.max_bytes: int = max_bytes
        self.max_age: float = max_age
        self.size: int = 0
        self._sequence = sequence
        self._offsets: list[int] = []  # the offsets of the entries, for binary searches
        self._entries: list[Entry] = []
        self._start = 0  # index of the first entry that is left; dropped ones are removed from time to time
        self._memo: tuple[int, int, int, tuple[bytes, int, int]] | None = None  # the arguments and result of `read`

    def __len__(self) -> int:
        return len(self._offsets) - self._start

    @property
    def newest(self) -> int:
        """The offset of the last event, whether or not the event is left."""
        return self._offsets[-1] if len(self) else self.trimmed

    @property
    def last(self) -> Entry | None:
        """The last event, if it is left."""
        return self._entries[-1] if len(self) else None

    @property
    def last_time(self) -> float:
        """When the last event was appended; ``-inf`` if no event is left."""
        return self._entries[-1].time if len(self) else -math.inf

    def append(self, entry: Entry) -> None:
        """Add the newest event, and drop events beyond the limits."""
        self._offsets.append(entry.offset)
        self._entries.append(entry)
        self._sequence.append(entry)
        self.size += _cost(entry)
        self._trim()
        self.expire(entry.time)

    def keep(self, max_bytes: int) -> None:
        """Keep any number of events of any age from now on, up to `max_bytes` bytes."""
        self.history = self.max_age = math.inf
        self.max_bytes = max_bytes
        self.whole = False
        self._trim()

    def fill(self, entries: Iterable[Entry], trimmed: int, until: int) -> None:
        """Put dropped events back; see `EventLog.fill`. Events that are left are not added again."""
        if until < self.trimmed:
            return  # later events were dropped meanwhile, so filling would leave an unnoticed gap
        older = [entry for entry in entries if entry.offset <= self.trimmed]
        self._offsets[: self._start] = [entry.offset for entry in older]
        self._entries[: self._start] = older
        self._start = 0
        self._memo = None
        self.size += sum(map(_cost, older))
        self.trimmed = min(trimmed, self.trimmed)
        self.whole = True
        self._sequence.valid = False
        self._trim()

    def miss(self, offset: int) -> None:
        """Drop all events, because events up to `offset` are missing."""
        self.clear()
        self.trimmed = max(offset, self.trimmed)
        self.whole = False

    def drop_oldest(self) -> None:
        """Drop the oldest event that is left."""
        self._memo = None
        self._drop()

    def clear(self) -> None:
        """Drop all events."""
        self._memo = None
        while len(self):
            self._drop()

    def expire(self, now: float) -> None:
        """Drop the events that are older than `max_age` at the time `now`."""
        since = now - self.max_age
        while len(self) and self._entries[self._start].time <= since:
            self._drop()

    def _trim(self) -> None:
        while len(self) > self.history or (self.size > self.max_bytes and len(self) > 1):
            self._drop()

    def _drop(self) -> None:
        entry = self._entries[self._start]
        self._entries[self._start] = _DROPPED
        self._sequence.drop(entry.offset)
        self.trimmed = entry.offset
        self.size -= _cost(entry)
        self._start += 1
        if self._start > _MIN_DROPPED and self._start > len(self._offsets) // 2:
            del self._offsets[: self._start], self._entries[: self._start]
            self._start = 0

    def after(self, offset: int) -> Iterator[Entry]:
        """Return the entries after `offset`."""
        return map(self._entries.__getitem__, range(self._index_after(offset), len(self._entries)))

    def count(self, offset: int) -> int:
        """Return how many entries there are after `offset`."""
        return len(self._offsets) - self._index_after(offset)

    def has(self, offset: int) -> bool:
        """Return whether there are entries after `offset`."""
        return len(self) > 0 and self._offsets[-1] > offset

    def _index_after(self, offset: int) -> int:
        return bisect_right(self._offsets, offset, self._start)

    def read(self, offset: int, limit: int) -> tuple[bytes, int, int]:
        """Join the encoded events after `offset`.

        Subscribers at the same offset share one result until the next event is appended.

        Args:
            offset: The offset of the last event that was read.
            limit: The most bytes. The first event may be larger.

        Returns:
            The bytes, the number of events, and the offset of the last one.
        """
        if not self.has(offset):
            return b"", 0, offset
        newest, memo = self._offsets[-1], self._memo
        if memo is not None and memo[0] == offset and memo[1] == limit and memo[2] == newest:
            return memo[3]
        first = self._index_after(offset)
        if first == len(self._offsets) - 1:
            return self._entries[first].chunk, 1, newest
        size, last = 0, first
        chunks: list[bytes] = []
        for entry in map(self._entries.__getitem__, range(first, len(self._entries))):
            size += len(entry.chunk)
            if size > limit and chunks:
                break
            chunks.append(entry.chunk)
            last = entry.offset
        result = b"".join(chunks), len(chunks), last
        if last == newest:
            self._memo = (offset, limit, newest, result)
        return result


def _cost(entry: Entry) -> int:
    # An entry holds its data as text and encoded. Without the constant, a million small events would count as 36 MB
    # and take 390.
    return _ENTRY_BYTES + 2 * len(entry.chunk)


_DROPPED: Final = Entry(0, "", ServerSentEvent(""), b"", 0.0)  # takes the place of a dropped entry
