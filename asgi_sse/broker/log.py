"""`EventLog`: the events of all channels of a broker, in one sequence, with a bounded ring for each channel.

All channels share one sequence of offsets, so one ``Last-Event-ID`` resumes any mix of them. The log does no I/O, and
has neither a clock nor a lock of its own.
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

from asgi_sse.errors import short_repr
from asgi_sse.protocol.event import ServerSentEvent, event_with_id

from .ring import Entry, Ring, Sequence

ResetReason: TypeAlias = Literal[
    "expired",  # the log has dropped events after the id
    "unknown",  # the id is malformed, or its offset was never used
    "epoch",  # the id is from an earlier log, before the broker was restarted
    "overflow",  # the subscriber reads more slowly than the log drops events
]

_MAX_SORTED: Final = 1000
"""Up to this many entries, sorting all of them is faster than merging as many as are wanted."""

_MAX_CHANNEL_READS: Final = 64
"""A subscriber of more channels reads through the sequence of all events, not through the ring of each channel."""

_MAX_COUNTED: Final = 8
"""The unread events of more channels are not counted, because the count blocks publishers for thousands of cursors."""

_EPOCH: Final = re.compile(r"[0-9a-z]{1,32}")
# An id has fewer than 128 bytes, all of them CORS-safe, so that a ``Last-Event-ID`` needs no preflight request.
_ID: Final = re.compile(r"([0-9a-z]{1,32})-(0|[1-9][0-9]{0,17})")


class EventLog:
    """The events of all channels.

    Args:
        history: How many events each channel keeps.
        max_bytes: Memory in bytes that the events of each channel may take, about. The newest event is kept whatever
            its size is.
        max_age: Seconds for which events are kept; ``None`` for no limit.
        max_channels: How many channels are kept. To keep a new one, the log forgets the one that was published to
            least recently.
        epoch: Distinguishes this log from others: up to 32 of 0-9 a-z. Default: random.

    Attributes:
        last_offset: The offset of the last event of all channels.
        epoch: The first part of each id.

    Raises:
        ValueError: A limit is out of range, or the epoch is invalid.
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
                raise ValueError(f"{name} must be a whole number of at least 1, got {short_repr(value)}")
        if max_age is not None and not max_age > 0:
            raise ValueError(f"max_age must be more than 0 seconds, got {max_age!r}; pass None for no limit")
        if epoch is not None and not _EPOCH.fullmatch(epoch):
            raise ValueError(f"epoch must be 1 to 32 of 0-9 a-z, got {short_repr(epoch)}")
        self.epoch: str = epoch or secrets.token_hex(4)
        self.last_offset: int = 0
        self._history: float = history
        self._max_bytes = max_bytes
        self._max_age = math.inf if max_age is None else max_age
        self._max_channels = max_channels
        self._sequence = Sequence()
        self._rings: dict[str, Ring] = {}
        self._order: OrderedDict[str, None] = OrderedDict()  # channels that may be forgotten, the next one first
        # The last offset of each forgotten channel. There are at most `max_channels` of them.
        self._forgotten: OrderedDict[str, int] = OrderedDict()
        # The last offset of all channels that are not even in `_forgotten`. A cursor before it may have missed events
        # of a channel that is not known any more.
        self._floor = 0
        self._kept: dict[str, int] = {}  # the channels of runs, each with its `max_bytes`
        self._cut = 0  # the offset up to which `cut` has dropped events

    def __contains__(self, channel: str) -> bool:
        return channel in self._rings or channel in self._forgotten

    @property
    def channels(self) -> list[str]:
        """The channels that have a ring, or whose last offset is known."""
        return [*self._rings, *self._forgotten]

    @property
    def kept_channels(self) -> int:
        """The number of channels that have a ring."""
        return len(self._rings)

    def id_of(self, offset: int) -> str:
        """Return the id of the event at `offset`."""
        return f"{self.epoch}-{offset}"

    def entry(self, offset: int, channel: str, event: ServerSentEvent, now: float, *, end: str | None = None) -> Entry:
        """Return an entry for an event without an id. The entry's event has the id of `offset`."""
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
        """Append an event and return its entry.

        Args:
            channel: A valid name.
            event: The event, without an id.
            now: The time in seconds, for `max_age`.
            offset: The offset, greater than all before. Default: the next one.
            end: On the last event of a run: how the run ended.
        """
        entry = self.entry(self.last_offset + 1 if offset is None else offset, channel, event, now, end=end)
        self.last_offset = entry.offset
        self._ring_of(channel).append(entry)
        self._forget_least_recent(channel)
        return entry

    def keep(self, channel: str, max_bytes: int) -> None:
        """Keep all events of `channel`, of any number and age, up to `max_bytes` bytes, until `release`."""
        self._kept[channel] = max_bytes
        self._ring_of(channel).keep(max_bytes)
        self._order.pop(channel, None)

    def is_kept(self, channel: str) -> bool:
        """Return whether `keep` was called for `channel`."""
        return channel in self._kept

    def release(self, channel: str) -> None:
        """Drop the events of `channel` if `keep` was called for it."""
        if self._kept.pop(channel, None) is not None:
            self._forget(channel)

    # A log that is a part of a log on a server

    def restart(self, epoch: str, last_offset: int, known: Iterable[tuple[str, int]], floor: int) -> None:
        """Forget everything, and continue as a part of another log, without any event of it yet.

        Args:
            epoch: The epoch of the other log.
            last_offset: The offset of its last event.
            known: Its channels, each with its last offset; the one that was published to least recently first.
            floor: The last offset of all channels that the other log has forgotten.
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
        """Let channels keep any number of events. The server bounds all channels together, and `cut` follows it."""
        self._history = math.inf

    def skip(self, offset: int) -> None:
        """Advance to `offset`, at which there is no event."""
        self.last_offset = offset

    def miss(self, channel: str, offset: int) -> None:
        """Note that events of `channel` up to `offset` are not in this process."""
        ring = self._rings.get(channel)
        if ring is not None:
            ring.miss(offset)
        else:
            self._remember(channel, offset)

    def fill(self, channel: str, entries: Iterable[Entry], trimmed: int, until: int) -> None:
        """Put back the events of a channel that are not in this process.

        Args:
            channel: The name of the channel.
            entries: The events of the channel on the server, oldest first.
            trimmed: The offset up to which the server has no events of the channel.
            until: The offset up to which `entries` is complete. If this process has dropped an event after it
                meanwhile, nothing is put back.
        """
        self._ring_of(channel).fill(entries, trimmed, until)
        self._forget_least_recent(channel)

    def missing(self, channels: Iterable[str], after: int) -> list[str]:
        """Return those of `channels` that may have more events after an offset on the server than in this process."""
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
        """Drop the events of all channels up to `offset`, except those of channels for which `keep` was called."""
        for entry in self._sequence_from(self._cut):
            if entry.offset > offset:
                break
            if entry.channel in self._order:
                self._rings[entry.channel].drop_oldest()
        self._cut = offset
        self._floor = max(self._floor, offset)

    def expire(self, now: float) -> None:
        """Forget the channels whose events are all older than `max_age` at the time `now`."""
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

    # Reads

    def parse(self, last_event_id: str) -> int | ResetReason:
        """Return the offset of an id, or the reason why the id cannot be resumed from."""
        found = _ID.fullmatch(last_event_id)
        if found is None:
            return "unknown"
        if found[1] != self.epoch:
            return "epoch"
        offset = int(found[2])
        return offset if offset <= self.last_offset else "unknown"

    def is_complete(self, channels: Iterable[str], now: float, *, patterns: bool, after: int) -> bool:
        """Return whether the log still has all events of `channels` after an offset.

        Args:
            channels: The names, including those that match a pattern.
            now: The time in seconds. Events older than `max_age` are dropped first.
            patterns: Whether `channels` come from a pattern. If so, any forgotten channel may have matched it.
            after: The offset.
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
        """Return the last event of a channel if the log still has it."""
        ring = self._rings.get(channel)
        return ring.last if ring is not None else None

    def ring(self, channel: str) -> Ring | None:
        """Return the ring of a channel if the channel has one."""
        return self._rings.get(channel)

    def entries(self, channels: Collection[str], after: int) -> Iterable[Entry]:
        """Return the events of `channels` after an offset, ordered by offset."""
        if len(channels) > _MAX_CHANNEL_READS:
            return (entry for entry in self._sequence_from(after) if entry.channel in channels)
        rings = [ring for ring in map(self._rings.get, channels) if ring is not None and ring.has(after)]
        if len(rings) == 1:
            return rings[0].after(after)
        if sum(ring.count(after) for ring in rings) <= _MAX_SORTED:
            return sorted(chain.from_iterable(ring.after(after) for ring in rings), key=attrgetter("offset"))
        return merge(*(ring.after(after) for ring in rings), key=attrgetter("offset"))

    def count(self, channels: Collection[str], after: int) -> int:
        """Return how many events `channels` have after an offset; of more than a few channels, an upper bound."""
        if len(channels) > _MAX_COUNTED:
            return self.last_offset - after
        rings = [ring for ring in map(self._rings.get, channels) if ring is not None and ring.has(after)]
        return sum(ring.count(after) for ring in rings)

    def _sequence_from(self, offset: int) -> Iterator[Entry]:
        if not self._sequence.valid:
            self._sequence.make(chain.from_iterable(ring.after(0) for ring in self._rings.values()))
        return self._sequence.after(offset)
