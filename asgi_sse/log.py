"""The sequence of a broker's events: a bounded ring of encoded events for each channel, ids, and reads behind a cursor.

No I/O, no clock and no lock of its own. One counter numbers the events of all channels, so that one id tells how far a
stream has read, whichever channels it carries.
"""

import math
import re
import secrets
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import chain
from operator import attrgetter
from typing import Final, Literal, TypeAlias

from .errors import shown
from .event import ServerSentEvent, numbered_event

ResetReason: TypeAlias = Literal[
    "expired",  # events behind the position were dropped
    "unknown",  # the id is none of this log's
    "epoch",  # the id is of an earlier log: the broker was restarted
    "overflow",  # the reader was slower than the log forgets
]

_SORTED: Final = 1000
"""Entries up to which to sort all of several channels is faster than to merge as many as are wanted."""

_FEW: Final = 64
"""Channels up to which a reader looks through those that it reads, and above through all events."""

_COUNTED: Final = 8
"""Channels up to which what is unread of them is counted, for each of thousands of readers while nobody can publish."""

_ENTRY_BYTES: Final = 350
"""What an event takes beside its bytes: objects, their numbers, their places in lists. Measured on Python 3.12."""

MAX_NAME: Final = 200
"""Characters of a channel's name; it becomes a key of Redis and a subject of NATS."""

# Letters, digits and marks that are none of a wildcard's, in segments between dots.
_NAME: Final = re.compile(r"[A-Za-z0-9_~:/@+=,-]+(?:\.[A-Za-z0-9_~:/@+=,-]+)*")
_PATTERN: Final = re.compile(r"(?:[A-Za-z0-9_~:/@+=,-]+|\*)(?:\.(?:[A-Za-z0-9_~:/@+=,-]+|\*))*(?:\.\*\*)?|\*\*")
_EPOCH: Final = re.compile(r"[0-9a-z]{1,32}")
_ID: Final = re.compile(r"([0-9a-z]{1,32})-(0|[1-9][0-9]{0,17})")  # below 128 bytes and CORS-safe: no preflight for it


def check_name(name: str) -> str:
    """`name` itself, if a channel may be called so.

    Raises:
        TypeError: It is no ``str``.
        ValueError: It has other characters, or is too long.
    """
    if not isinstance(name, str):
        raise TypeError(f"channel {shown(name)} is {type(name).__name__}; give a str")
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise ValueError(
            f"channel {shown(name)}: give up to {MAX_NAME} of A-Z a-z 0-9 _ ~ : / @ + = , - in segments between dots"
        )
    return name


def is_pattern(name: str) -> bool:
    """Whether `name` stands for many channels."""
    return "*" in name


def check_pattern(name: str) -> str:
    """`name` itself, if it is a channel's name, or a pattern of names: ``*`` is one segment, ``**`` the rest.

    Raises:
        TypeError: It is no ``str``.
        ValueError: It is neither.
    """
    if not isinstance(name, str) or not is_pattern(name):
        return check_name(name)
    if len(name) > MAX_NAME or not _PATTERN.fullmatch(name):
        raise ValueError(
            f"pattern {shown(name)}: '*' stands for one whole segment, as in 'orders.*', and '**' at the end for all "
            "that follow, as in 'orders.**'"
        )
    return name


def pattern_test(pattern: str) -> Callable[[str], bool]:
    """A function that tells whether a channel's name matches `pattern`."""
    if pattern == "**":
        return lambda _: True
    parts = [re.escape(part) if part != "*" else r"[^.]+" for part in pattern.removesuffix(".**").split(".")]
    text = r"\.".join(parts) + (r"\..+" if pattern.endswith(".**") else "")
    matches = re.compile(text).fullmatch
    return lambda name: matches(name) is not None


@dataclass(slots=True, eq=False)
class Entry:
    """One event of the log.

    Attributes:
        number: Its place in the sequence of all channels.
        channel: The channel's name.
        event: The event, with its id.
        chunk: The event, encoded.
        time: When it was appended, by the clock of who did.
        end: How the run ended of which it is the last event; ``None``: it is any other.
    """

    number: int
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

    __slots__ = ("_entries", "_holes", "_numbers", "valid")

    def __init__(self) -> None:
        self.valid = True
        self._numbers: list[int] = []
        self._entries: list[Entry | None] = []  # None: it was dropped
        self._holes = 0

    def make(self, entries: Iterable[Entry]) -> None:
        """Begin anew, with these in any order."""
        ordered = sorted(entries, key=attrgetter("number"))
        self._numbers = [entry.number for entry in ordered]
        self._entries = list(ordered)
        self._holes = 0
        self.valid = True

    def append(self, entry: Entry) -> None:
        """Add the newest one."""
        if self.valid:
            self._numbers.append(entry.number)
            self._entries.append(entry)

    def drop(self, number: int) -> None:
        """Forget one."""
        if not self.valid:
            return
        self._entries[bisect_left(self._numbers, number)] = None
        self._holes += 1
        if self._holes > 1000 and self._holes > len(self._numbers) // 2:
            self._entries = [entry for entry in self._entries if entry is not None]
            self._numbers = [entry.number for entry in self._entries if entry is not None]
            self._holes = 0

    def after(self, number: int) -> Iterator[Entry]:
        """The entries behind a number."""
        first = bisect_right(self._numbers, number)
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
        "_entries", "_memo", "_numbers", "_sequence", "_start", "history", "max_age", "max_bytes", "size", "trimmed",
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
        self._numbers: list[int] = []  # of the entries, to be searched
        self._entries: list[Entry] = []
        self._start = 0  # of both, what was dropped before it is cleared now and then
        self._memo: tuple[int, int, int, tuple[bytes, int, int]] | None = None

    def __len__(self) -> int:
        return len(self._numbers) - self._start

    @property
    def newest(self) -> int:
        """The number of the last event, whether or not it is left."""
        return self._numbers[-1] if len(self) else self.trimmed

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
        self._numbers.append(entry.number)
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
        older = [entry for entry in entries if entry.number <= self.trimmed]
        self._numbers[: self._start] = [entry.number for entry in older]
        self._entries[: self._start] = older
        self._start = 0
        self._memo = None
        self.size += sum(map(_cost, older))
        self.trimmed = min(trimmed, self.trimmed)
        self.whole = True
        self._sequence.valid = False
        self._trim()

    def miss(self, number: int) -> None:
        """Drop everything: there was more, up to a number, that is not known."""
        self.clear()
        self.trimmed = max(number, self.trimmed)
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
        self._sequence.drop(entry.number)
        self.trimmed = entry.number
        self.size -= _cost(entry)
        self._start += 1
        if self._start > 64 and self._start > len(self._numbers) // 2:
            del self._numbers[: self._start], self._entries[: self._start]
            self._start = 0

    def after(self, number: int) -> Iterator[Entry]:
        """The entries behind a number."""
        return map(self._entries.__getitem__, range(self._behind(number), len(self._entries)))

    def count(self, number: int) -> int:
        """How many entries there are behind a number."""
        return len(self._numbers) - self._behind(number)

    def has(self, number: int) -> bool:
        """Whether there is anything behind a number."""
        return len(self) > 0 and self._numbers[-1] > number

    def _behind(self, number: int) -> int:
        return bisect_right(self._numbers, number, self._start)

    def read(self, number: int, limit: int) -> tuple[bytes, int, int]:
        """What is behind `number`, joined: at most `limit` bytes or one larger event.

        Readers at the same place share one result, until something is appended.

        Returns:
            The bytes, how many events they are, and the number of the last one.
        """
        if not self.has(number):
            return b"", 0, number
        newest, memo = self._numbers[-1], self._memo
        if memo is not None and memo[0] == number and memo[1] == limit and memo[2] == newest:
            return memo[3]
        first = self._behind(number)
        if first == len(self._numbers) - 1:
            return self._entries[first].chunk, 1, newest
        size, last = 0, first
        chunks: list[bytes] = []
        for entry in map(self._entries.__getitem__, range(first, len(self._entries))):
            size += len(entry.chunk)
            if size > limit and chunks:
                break
            chunks.append(entry.chunk)
            last = entry.number
        result = b"".join(chunks), len(chunks), last
        if last == newest:
            self._memo = (number, limit, newest, result)
        return result


def _cost(entry: Entry) -> int:
    # An entry has its data as text and encoded. Without a constant, a million small events would count 36 MB, and
    # take 390.
    return _ENTRY_BYTES + 2 * len(entry.chunk)


_NOTHING: Final = Entry(0, "", ServerSentEvent(""), b"", 0.0)  # in the place of what was dropped


class EventLog:
    """The events of all channels.

    Args:
        history: Events that each channel keeps.
        max_bytes: Memory that the events of each channel may take, about; the newest one is kept whatever its size.
        max_age: Seconds for which events are kept; ``None``: until there are too many.
        max_channels: Channels that are kept. Beyond, the one that was published to least recently goes.
        epoch: Tells this log from others; up to 32 of 0-9 a-z. Default: at random.

    Attributes:
        tail: The number of the last event of all.
        epoch: Its part of each id.

    Raises:
        ValueError: A limit is out of range.
    """

    def __init__(
        self,
        *,
        history: int = 1000,
        max_bytes: int = 16 * 1024 * 1024,
        max_age: float | None = None,
        max_channels: int = 10_000,
        epoch: str | None = None,
    ) -> None:
        for name, value in (("history", history), ("max_bytes", max_bytes), ("max_channels", max_channels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} is out of range; give a whole number of at least 1")
        if max_age is not None and not max_age > 0:
            raise ValueError(f"max_age={max_age!r} is no age; give seconds, or None for any")
        if epoch is not None and not _EPOCH.fullmatch(epoch):
            raise ValueError(f"epoch={epoch!r}; give up to 32 of 0-9 a-z")
        self.epoch = epoch or secrets.token_hex(4)
        self.tail = 0
        self._history: float = history
        self._max_bytes = max_bytes
        self._max_age = math.inf if max_age is None else max_age
        self._max_channels = max_channels
        self._sequence = Sequence()
        self._rings: dict[str, Ring] = {}
        self._order: OrderedDict[str, None] = OrderedDict()  # those of them that may be forgotten, the next one first
        # The last number of each channel that was forgotten, as many as there may be channels; and of those that are
        # not even there any more: a reader in front of it may have missed something of a channel that nobody knows.
        self._forgotten: OrderedDict[str, int] = OrderedDict()
        self._floor = 0
        self._kept: dict[str, int] = {}  # channels, with the memory that each may take
        self._cut = 0  # before which `cut` has looked

    def __contains__(self, channel: str) -> bool:
        return channel in self._rings or channel in self._forgotten

    @property
    def channels(self) -> list[str]:
        """The channels of which anything is known."""
        return [*self._rings, *self._forgotten]

    @property
    def kept_channels(self) -> int:
        """How many channels there are of which there are events."""
        return len(self._rings)

    def id_of(self, number: int) -> str:
        """The id of an event, or of a position."""
        return f"{self.epoch}-{number}"

    def entry(self, number: int, channel: str, event: ServerSentEvent, now: float, *, end: str | None = None) -> Entry:
        """An event, which has no id of its own, as one of this log."""
        event = numbered_event(event, self.id_of(number))
        return Entry(number, channel, event, event.encode(), now, end)

    def append(
        self,
        channel: str,
        event: ServerSentEvent,
        now: float,
        *,
        number: int | None = None,
        end: str | None = None,
    ) -> Entry:
        """Add an event, which has no id of its own.

        Args:
            channel: A valid name.
            event: The event.
            now: The time, for `max_age`.
            number: Its number, greater than any before. Default: the next one.
            end: See `Entry`.
        """
        entry = self.entry(self.tail + 1 if number is None else number, channel, event, now, end=end)
        self.tail = entry.number
        self._ring_of(channel).append(entry)
        self._forget_least_recent(channel)
        return entry

    def keep(self, channel: str, max_bytes: int) -> None:
        """All events of `channel` from now on, whatever their number and age, up to so many bytes; until `release`."""
        self._kept[channel] = max_bytes
        self._ring_of(channel).keep(max_bytes)
        self._order.pop(channel, None)

    def is_kept(self, channel: str) -> bool:
        """Whether all events of `channel` are."""
        return channel in self._kept

    def release(self, channel: str) -> None:
        """Drop what was kept of `channel`."""
        if self._kept.pop(channel, None) is not None:
            self._forget(channel)

    # What is a part of another log, on another machine

    def restart(self, epoch: str, tail: int, known: Iterable[tuple[str, int]], floor: int) -> None:
        """Forget all, and go on as a part of another log, of which nothing is here yet.

        Args:
            epoch: Its epoch.
            tail: The number of its last event.
            known: Its channels, each with the number of its last event, least recently published to first.
            floor: The last number of the channels that it has forgotten.
        """
        self.epoch = epoch
        self.tail = self._cut = tail
        self._rings.clear()
        self._order.clear()
        self._sequence = Sequence()
        self._forgotten = OrderedDict(known)
        self._floor = floor
        for channel, max_bytes in self._kept.items():
            self.keep(channel, max_bytes)

    def keep_many(self) -> None:
        """From now on, channels keep any number of events: `cut` bounds all of them together, as the other log does."""
        self._history = math.inf

    def skip(self, number: int) -> None:
        """A number was given to something that is no event."""
        self.tail = number

    def miss(self, channel: str, number: int) -> None:
        """`channel` had events up to a number that are not here."""
        ring = self._rings.get(channel)
        if ring is not None:
            ring.miss(number)
        else:
            self._remember(channel, number)

    def fill(self, channel: str, entries: Iterable[Entry], trimmed: int, until: int) -> None:
        """Put back what is not here of a channel.

        Args:
            channel: Its name.
            entries: What it has, oldest first.
            trimmed: The number since which there is nothing before them.
            until: The number up to which they are all there is. If what came behind it was dropped by now, nothing is.
        """
        self._ring_of(channel).fill(entries, trimmed, until)
        self._forget_least_recent(channel)

    def missing(self, channels: Iterable[str], after: int) -> list[str]:
        """Those of `channels` of which the other log may have more behind a position than is here."""
        names = []
        for name in channels:
            ring = self._rings.get(name)
            if (
                after < self._forgotten.get(name, self._floor)
                if ring is None
                else after < ring.trimmed and not ring.whole
            ):
                names.append(name)
        return names

    def cut(self, number: int) -> None:
        """Drop the events of all channels up to a number, but of those that are kept."""
        for entry in self._sequence_from(self._cut):
            if entry.number > number:
                break
            if entry.channel in self._order:
                self._rings[entry.channel].drop_oldest()
        self._cut = number
        self._floor = max(self._floor, number)

    def expire(self, now: float) -> None:
        """Forget the channels in which all is older than `max_age`."""
        since = now - self._max_age
        while self._order and self._rings[next(iter(self._order))].last_time <= since:
            self._forget(next(iter(self._order)))

    def _ring_of(self, channel: str) -> Ring:
        ring = self._rings.get(channel)
        if ring is None:
            trimmed = self._forgotten.pop(channel, self._floor)
            ring = self._rings[channel] = Ring(
                trimmed,
                self._sequence,
                history=self._history,
                max_bytes=self._max_bytes,
                max_age=self._max_age,
            )
            self._order[channel] = None
        return ring

    def _forget_least_recent(self, channel: str) -> None:
        if channel in self._order:
            self._order.move_to_end(channel)
        while len(self._order) > self._max_channels:
            self._forget(next(iter(self._order)))

    def _forget(self, channel: str) -> None:
        self._order.pop(channel, None)
        ring = self._rings.pop(channel)
        newest = ring.newest
        ring.clear()
        self._remember(channel, newest)

    def _remember(self, channel: str, number: int) -> None:
        self._forgotten[channel] = number
        self._forgotten.move_to_end(channel)
        if len(self._forgotten) > self._max_channels:
            self._floor = max(self._floor, self._forgotten.popitem(last=False)[1])

    def parse(self, last_event_id: str) -> int | ResetReason:
        """The position that an id stands for, or why it stands for none."""
        found = _ID.fullmatch(last_event_id)
        if found is None:
            return "unknown"
        if found[1] != self.epoch:
            return "epoch"
        number = int(found[2])
        return number if number <= self.tail else "unknown"

    def is_complete(self, channels: Iterable[str], now: float, *, patterns: bool, after: int) -> bool:
        """Whether all that `channels` had behind a position is still there.

        Args:
            channels: Names, those that match a pattern among them.
            now: The time: what is too old is dropped first.
            patterns: Whether there is a pattern: then any channel that was forgotten may have been one of them.
            after: The position.
        """
        if patterns and after < self._floor:
            return False
        for name in channels:
            ring = self._rings.get(name)
            if ring is None:
                trimmed = self._forgotten.get(name, self._floor)
            else:
                ring.expire(now)
                trimmed = ring.trimmed
            if after < trimmed:
                return False
        return True

    def last(self, channel: str) -> Entry | None:
        """The last event of a channel, if it is here."""
        ring = self._rings.get(channel)
        return ring.last if ring is not None else None

    def ring(self, channel: str) -> Ring | None:
        """The ring of a channel, if it has one."""
        return self._rings.get(channel)

    def entries(self, channels: Collection[str], after: int) -> Iterable[Entry]:
        """What `channels` have behind a position, in the order of the sequence."""
        if len(channels) > _FEW:
            return (entry for entry in self._sequence_from(after) if entry.channel in channels)
        rings = [ring for ring in map(self._rings.get, channels) if ring is not None and ring.has(after)]
        if len(rings) == 1:
            return rings[0].after(after)
        if sum(ring.count(after) for ring in rings) <= _SORTED:
            return sorted(chain.from_iterable(ring.after(after) for ring in rings), key=attrgetter("number"))
        return merge(*(ring.after(after) for ring in rings), key=attrgetter("number"))

    def count(self, channels: Collection[str], after: int) -> int:
        """How many events `channels` have behind a position; of more than a few, how many there are at the most."""
        if len(channels) > _COUNTED:
            return self.tail - after
        rings = [ring for ring in map(self._rings.get, channels) if ring is not None and ring.has(after)]
        return sum(ring.count(after) for ring in rings)

    def _sequence_from(self, number: int) -> Iterator[Entry]:
        if not self._sequence.valid:
            self._sequence.make(chain.from_iterable(ring.after(0) for ring in self._rings.values()))
        return self._sequence.after(number)
