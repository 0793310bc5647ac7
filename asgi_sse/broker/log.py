"""The sequence of a broker's events: a bounded ring of encoded events for each channel, ids, and reads behind a cursor.

No I/O, no clock and no lock of its own. One counter numbers the events of all channels, so that one id tells how far a
stream has read, whichever channels it carries.
"""

import math
import re
import secrets
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from heapq import merge
from itertools import chain
from operator import attrgetter
from typing import Final, Literal, TypeAlias

from asgi_sse.protocol.event import ServerSentEvent, event_with_id

from .ring import Entry, Ring, Sequence

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

_EPOCH: Final = re.compile(r"[0-9a-z]{1,32}")
_ID: Final = re.compile(r"([0-9a-z]{1,32})-(0|[1-9][0-9]{0,17})")  # below 128 bytes and CORS-safe: no preflight for it


class EventLog:
    """The events of all channels.

    Args:
        history: Events that each channel keeps.
        max_bytes: Memory that the events of each channel may take, about; the newest one is kept whatever its size.
        max_age: Seconds for which events are kept; ``None``: until there are too many.
        max_channels: Channels that are kept. Beyond, the one that was published to least recently goes.
        epoch: Tells this log from others; up to 32 of 0-9 a-z. Default: at random.

    Attributes:
        last_offset: The number of the last event of all.
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
        self.last_offset = 0
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

    def id_of(self, offset: int) -> str:
        """The id of an event, or of a position."""
        return f"{self.epoch}-{offset}"

    def entry(self, offset: int, channel: str, event: ServerSentEvent, now: float, *, end: str | None = None) -> Entry:
        """An event, which has no id of its own, as one of this log."""
        event = event_with_id(event, self.id_of(offset))
        return Entry(offset, channel, event, event.encode(), now, end)

    def append(
        self,
        channel: str,
        event: ServerSentEvent,
        now: float,
        *,
        offset: int | None = None,
        end: str | None = None,
    ) -> Entry:
        """Add an event, which has no id of its own.

        Args:
            channel: A valid name.
            event: The event.
            now: The time, for `max_age`.
            offset: Its number, greater than any before. Default: the next one.
            end: See `Entry`.
        """
        entry = self.entry(self.last_offset + 1 if offset is None else offset, channel, event, now, end=end)
        self.last_offset = entry.offset
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

    def restart(self, epoch: str, last_offset: int, known: Iterable[tuple[str, int]], floor: int) -> None:
        """Forget all, and go on as a part of another log, of which nothing is here yet.

        Args:
            epoch: Its epoch.
            last_offset: The number of its last event.
            known: Its channels, each with the number of its last event, least recently published to first.
            floor: The last number of the channels that it has forgotten.
        """
        self.epoch = epoch
        self.last_offset = self._cut = last_offset
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

    def skip(self, offset: int) -> None:
        """A number was given to something that is no event."""
        self.last_offset = offset

    def miss(self, channel: str, offset: int) -> None:
        """`channel` had events up to a number that are not here."""
        ring = self._rings.get(channel)
        if ring is not None:
            ring.miss(offset)
        else:
            self._remember(channel, offset)

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

    def cut(self, offset: int) -> None:
        """Drop the events of all channels up to a number, but of those that are kept."""
        for entry in self._sequence_from(self._cut):
            if entry.offset > offset:
                break
            if entry.channel in self._order:
                self._rings[entry.channel].drop_oldest()
        self._cut = offset
        self._floor = max(self._floor, offset)

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

    def _remember(self, channel: str, offset: int) -> None:
        self._forgotten[channel] = offset
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
        offset = int(found[2])
        return offset if offset <= self.last_offset else "unknown"

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
            return sorted(chain.from_iterable(ring.after(after) for ring in rings), key=attrgetter("offset"))
        return merge(*(ring.after(after) for ring in rings), key=attrgetter("offset"))

    def count(self, channels: Collection[str], after: int) -> int:
        """How many events `channels` have behind a position; of more than a few, how many there are at the most."""
        if len(channels) > _COUNTED:
            return self.last_offset - after
        rings = [ring for ring in map(self._rings.get, channels) if ring is not None and ring.has(after)]
        return sum(ring.count(after) for ring in rings)

    def _sequence_from(self, offset: int) -> Iterator[Entry]:
        if not self._sequence.valid:
            self._sequence.make(chain.from_iterable(ring.after(0) for ring in self._rings.values()))
        return self._sequence.after(offset)
