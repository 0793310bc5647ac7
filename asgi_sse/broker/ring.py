"""`Ring`: the newest events of one channel; and `Sequence`: those of all, in the order of their numbers."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from asgi_sse.protocol.event import ServerSentEvent

_ENTRY_BYTES: Final = 350
"""What an event takes beside its bytes: objects, their numbers, their places in lists. Measured on Python 3.12."""


@dataclass(slots=True, eq=False)
class Entry:
    """One event of the log.

    Attributes:
        offset: Its place in the sequence of all channels.
        channel: The channel's name.
        event: The event, with its id.
        chunk: The event, encoded.
        time: When it was appended, by the clock of who did.
        end: How the run ended of which it is the last event; ``None``: it is any other.
    """

    offset: int
    channel: str
    event: ServerSentEvent
    chunk: bytes
    time: float
    end: str | None = None


class Sequence:
    """The entries of all channels in the order of their numbers, for who reads many of them.

    Attributes:
        valid: Whether it has them. Without, it does nothing until it is made anew.
    """

    __slots__ = ("_entries", "_holes", "_offsets", "valid")

    def __init__(self) -> None:
        self.valid = True
        self._offsets: list[int] = []
        self._entries: list[Entry | None] = []  # None: it was dropped
        self._holes = 0

    def make(self, entries: Iterable[Entry]) -> None:
        """Begin anew, with these in any order."""
        ordered = sorted(entries, key=attrgetter("offset"))
        self._offsets = [entry.offset for entry in ordered]
        self._entries = list(ordered)
        self._holes = 0
        self.valid = True

    def append(self, entry: Entry) -> None:
        """Add the newest one."""
        if self.valid:
            self._offsets.append(entry.offset)
            self._entries.append(entry)

    def drop(self, offset: int) -> None:
        """Forget one."""
        if not self.valid:
            return
        self._entries[bisect_left(self._offsets, offset)] = None
        self._holes += 1
        if self._holes > 1000 and self._holes > len(self._offsets) // 2:
            self._entries = [entry for entry in self._entries if entry is not None]
            self._offsets = [entry.offset for entry in self._entries if entry is not None]
            self._holes = 0

    def after(self, offset: int) -> Iterator[Entry]:
        """The entries behind a number."""
        first = bisect_right(self._offsets, offset)
        return filter(None, map(self._entries.__getitem__, range(first, len(self._entries))))


class Ring:
    """The events that a channel still has, oldest first.

    Args:
        trimmed: See below.
        sequence: That of all channels.
        history: See below.
        max_bytes: See below.
        max_age: See below.

    Attributes:
        trimmed: The number of the last event that was dropped; what was before it is not known.
        whole: Of a log that is a part of another one: whether all is here, or was, that the other one has.
        size: The memory that it takes, about, in bytes.
        history: Events that it keeps.
        max_bytes: Bytes that it keeps.
        max_age: Seconds for which it keeps them.
    """

    __slots__ = (
        "_entries", "_memo", "_offsets", "_sequence", "_start", "history", "max_age", "max_bytes", "size", "trimmed",
        "whole",
    )  # fmt: skip

    def __init__(self, trimmed: int, sequence: Sequence, *, history: float, max_bytes: int, max_age: float) -> None:
        self.trimmed = trimmed
        self.whole = False
        self.history = history
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.size = 0
        self._sequence = sequence
        self._offsets: list[int] = []  # of the entries, to be searched
        self._entries: list[Entry] = []
        self._start = 0  # of both, what was dropped before it is cleared now and then
        self._memo: tuple[int, int, int, tuple[bytes, int, int]] | None = None

    def __len__(self) -> int:
        return len(self._offsets) - self._start

    @property
    def newest(self) -> int:
        """The number of the last event, whether or not it is left."""
        return self._offsets[-1] if len(self) else self.trimmed

    @property
    def last(self) -> Entry | None:
        """The last event, if it is left."""
        return self._entries[-1] if len(self) else None

    @property
    def last_time(self) -> float:
        """When the last event that is left was appended; long ago, if none is."""
        return self._entries[-1].time if len(self) else -math.inf

    def append(self, entry: Entry) -> None:
        """Add the newest one, and drop what is too much."""
        self._offsets.append(entry.offset)
        self._entries.append(entry)
        self._sequence.append(entry)
        self.size += _cost(entry)
        self._trim()
        self.expire(entry.time)

    def keep(self, max_bytes: int) -> None:
        """From now on, keep events of any number and age, but only so many bytes."""
        self.history = self.max_age = math.inf
        self.max_bytes = max_bytes
        self.whole = False
        self._trim()

    def fill(self, entries: Iterable[Entry], trimmed: int, until: int) -> None:
        """Put back what was dropped: see `EventLog.fill`. Those that are there already are not."""
        if until < self.trimmed:
            return  # what came meanwhile was dropped as well: there would be a hole that nobody sees
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
        """Drop everything: there was more, up to a number, that is not known."""
        self.clear()
        self.trimmed = max(offset, self.trimmed)
        self.whole = False

    def drop_oldest(self) -> None:
        """Drop the first event that is left."""
        self._memo = None
        self._drop()

    def clear(self) -> None:
        """Drop everything."""
        self._memo = None
        while len(self):
            self._drop()

    def expire(self, now: float) -> None:
        """Drop what is too old."""
        since = now - self.max_age
        while len(self) and self._entries[self._start].time <= since:
            self._drop()

    def _trim(self) -> None:
        while len(self) > self.history or (self.size > self.max_bytes and len(self) > 1):
            self._drop()

    def _drop(self) -> None:
        entry = self._entries[self._start]
        self._entries[self._start] = _NOTHING
        self._sequence.drop(entry.offset)
        self.trimmed = entry.offset
        self.size -= _cost(entry)
        self._start += 1
        if self._start > 64 and self._start > len(self._offsets) // 2:
            del self._offsets[: self._start], self._entries[: self._start]
            self._start = 0

    def after(self, offset: int) -> Iterator[Entry]:
        """The entries behind a number."""
        return map(self._entries.__getitem__, range(self._behind(offset), len(self._entries)))

    def count(self, offset: int) -> int:
        """How many entries there are behind a number."""
        return len(self._offsets) - self._behind(offset)

    def has(self, offset: int) -> bool:
        """Whether there is anything behind a number."""
        return len(self) > 0 and self._offsets[-1] > offset

    def _behind(self, offset: int) -> int:
        return bisect_right(self._offsets, offset, self._start)

    def read(self, offset: int, limit: int) -> tuple[bytes, int, int]:
        """What is behind `offset`, joined: at most `limit` bytes or one larger event.

        Readers at the same place share one result, until something is appended.

        Returns:
            The bytes, how many events they are, and the number of the last one.
        """
        if not self.has(offset):
            return b"", 0, offset
        newest, memo = self._offsets[-1], self._memo
        if memo is not None and memo[0] == offset and memo[1] == limit and memo[2] == newest:
            return memo[3]
        first = self._behind(offset)
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
    # An entry has its data as text and encoded. Without a constant, a million small events would count 36 MB, and
    # take 390.
    return _ENTRY_BYTES + 2 * len(entry.chunk)


_NOTHING: Final = Entry(0, "", ServerSentEvent(""), b"", 0.0)  # in the place of what was dropped
