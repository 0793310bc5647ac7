"""`Cursor`: a subscriber's read position in the log, and the rules by which it advances."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from asgi_sse.protocol.event import ServerSentEvent

from .dispatcher import clock
from .patterns import is_pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .dispatcher import Dispatcher
    from .log import ResetReason
    from .ring import Entry
    from .snapshot import Snapshot

Overflow: TypeAlias = Literal["reset", "close"]


class RunSpan(Protocol):
    """Which events of a channel belong to a run. `start`, `final` and `whole` change when the log is replaced.

    Attributes:
        name: The name of the channel.
        start: The offset after which the events of the run begin.
        final: The offset of the last event; ``None`` while the run is running.
    """

    name: str
    start: int
    final: int | None

    @property
    def whole(self) -> bool:
        """Whether the log has the run from its first event on."""
        ...


class CursorOwner(Protocol):
    """What a cursor needs of the subscription that owns it."""

    def broker_closing(self) -> None:
        """Handle the close of the broker. Called from any thread."""
        ...


class Cursor:
    """A read position in the log, and the rules by which it advances.

    The dispatcher tells the cursor about new and lost events; it is a `Subscriber`. A subscription reads from the
    cursor, as an async iterable or for a stream. If the log dropped events that the cursor had not read, the
    subscriber gets one ``reset`` instead, or is closed.

    Hold the lock of the dispatcher during every call, except `wake`, `broker_closing`, `release`, `resolve`,
    `make_snapshot`, `next_of_snapshot` and `wants`.

    Args:
        dispatcher: The dispatcher whose log is read.
        names: See below.
        last_event_id: The id after which to begin; ``None`` or ``""`` for the end of the log, or for the first event
            of the run.
        filter: Returns whether an event is wanted; ``None`` for all.
        overflow: What happens after an overflow: ``reset`` or ``close``.
        snapshot: See below.
        run: See below.

    Attributes:
        names: The channels, and patterns of channels.
        dispatcher: The dispatcher whose log is read.
        snapshot: The snapshot that a new subscriber, or one that was reset, gets first; ``None`` if it gets none.
        run: The run that is read; ``None`` for anything else.
        owner: The subscription, while it is read.
        on_wake: Called in the event loop of the subscriber when there is something to read.
        position: The offset up to which events were read.
        delivered: The offset up to which the client has everything. ``None`` while it has nothing to resume from
            but the id it came with.
        delivered_events: The number of events delivered so far.
        batch: Entries that the async iterator has read and not delivered yet, the next one last.
        unresolved_id: The ``Last-Event-ID``, while it is not known whether all later events are in this process or
            can be fetched.
        reset_reason: Why events were lost, until the subscriber gets its ``reset``.
        has_unread: Whether there may be something to read.
        overflowed: Whether an overflow has ended the subscription.
        ended: Whether the subscription is over: closed, overflowed, or at the end of its run.
    """

    __slots__ = (
        "_channel",
        "_dirty",
        "_epoch",
        "_filter",
        "_initial_id",
        "_overflow",
        "_plain_channel",
        "batch",
        "delivered",
        "delivered_events",
        "dispatcher",
        "ended",
        "has_unread",
        "names",
        "on_wake",
        "overflowed",
        "owner",
        "position",
        "reset_reason",
        "run",
        "snapshot",
        "unresolved_id",
    )  # fmt: skip

    position: int
    ended: bool
    overflowed: bool
    delivered_events: int

    def __init__(
        self,
        dispatcher: Dispatcher,
        names: tuple[str, ...],
        *,
        last_event_id: str | None,
        filter: Callable[[ServerSentEvent], bool] | None,  # noqa: A002 (named after the argument of `Broker.subscribe`)
        overflow: Overflow,
        snapshot: Snapshot | None,
        run: RunSpan | None = None,
    ) -> None:
        self.names: tuple[str, ...] = names
        self.dispatcher: Dispatcher = dispatcher
        self.snapshot: Snapshot | None = snapshot
        self.run: RunSpan | None = run
        self.owner: CursorOwner | None = None
        self.on_wake: Callable[[], object] = _ignore
        self._filter = filter
        self._overflow = overflow
        self._initial_id = last_event_id or ""
        self._channel = names[0] if len(names) == 1 and not is_pattern(names[0]) else None
        # The channel, if the subscriber wants all of its events and nothing else.
        self._plain_channel = self._channel if filter is None and run is None and snapshot is None else None
        self._dirty: set[str] | None = None  # of several channels, those that may have something to read
        self.delivered: int | None = None
        self.delivered_events = 0
        self.batch: list[Entry] | tuple[()] = ()  # an idle subscriber needs no list
        self.unresolved_id: str | None = None
        self.reset_reason: ResetReason | None = None
        self.has_unread: bool = True
        self.overflowed = False
        self.ended = False
        with dispatcher.lock:
            # The epoch of the position. The log may have another one before the subscriber learns of it.
            self._epoch = dispatcher.log.epoch
            if last_event_id:
                self._begin_after(last_event_id)
            else:
                self._begin_without_id()

    def _begin_after(self, last_event_id: str) -> None:
        log = self.dispatcher.log
        offset = log.parse(last_event_id)
        if isinstance(offset, int):
            self.position = self.delivered = offset
        elif self.dispatcher.upstream is not None:  # another process may be ahead of this one
            self.unresolved_id = last_event_id
            self.position = log.last_offset
        else:
            self._reset(offset)

    def _begin_without_id(self) -> None:
        run = self.run
        self.position = self.dispatcher.log.last_offset if run is None else run.start
        if run is not None and not run.whole:
            self.reset_reason = "expired"  # the subscriber continues with the events that are left
        if self.snapshot is None:
            self.delivered = self.position
        else:
            self.snapshot.request(self.position)

    @property
    def last_event_id(self) -> str:
        """The id of the last delivered event: a subscription that begins with this id continues here."""
        return self._initial_id if self.delivered is None else f"{self._epoch}-{self.delivered}"

    # Called by the dispatcher

    def started(self, channels: list[str]) -> None:
        """Begin to receive notifications; events that were published since the cursor was made count too."""
        self.has_unread = True
        if self._channel is None:
            self._dirty = set(channels)
        if self.unresolved_id is not None:
            return
        if self._epoch != self.dispatcher.log.epoch:
            self._reset("epoch")
        elif not self._is_complete(channels):
            if self.dispatcher.upstream is None or (self.reset_reason is not None and self.run is None):
                self._reset("expired")
            else:
                self.unresolved_id = self.dispatcher.log.id_of(self.position)

    def published(self, channel: str, before: int) -> bool:
        """Note that `channel` has a new event; return whether to wake the subscriber."""
        if self._dirty is not None:
            self._dirty.add(channel)
        if self.has_unread:
            return False
        self.has_unread = True
        self.position = before  # all earlier events were read, so none of them can be missing
        return True

    def missed(self, channel: str) -> bool:
        """Note that `channel` has changed in another way; return whether to wake the subscriber."""
        if self._dirty is not None:
            self._dirty.add(channel)
        had_unread, self.has_unread = self.has_unread, True
        return not had_unread

    def log_restarted(self, channels: list[str], *, same_epoch: bool) -> bool:
        """Reset the subscriber unless nothing is lost; return whether to wake it."""
        if self.unresolved_id is not None:  # the id may be from the new log; `resolve` finds out
            if self._dirty is not None:
                self._dirty.update(channels)
            return False
        if same_epoch and self._is_complete(channels):
            return False
        self._reset("expired" if same_epoch else "epoch")
        return True

    def unread(self, above: int) -> int:
        """Return about how many events are unread, or 0 if it is not more than `above`."""
        batched = len(self.batch)
        # The cheap checks come first, because the count blocks all publishers.
        if (
            not self.has_unread
            or self.unresolved_id is not None
            or self.dispatcher.log.last_offset - self.position <= above - batched
        ):
            return batched
        return self.dispatcher.log.count(self._unread_channels(), self.position) + batched

    def wake(self) -> None:
        """Tell the reader of the subscription that there is something to read."""
        self.on_wake()

    def broker_closing(self) -> None:
        """Tell the subscription that the broker closes. Called from any thread, without the lock."""
        owner = self.owner
        if owner is not None:
            owner.broker_closing()

    def release(self) -> None:
        """End, and forget the subscription."""
        self.ended = True
        self.owner = None
        self.on_wake = _ignore

    # Where to begin

    async def resolve(self) -> None:
        """Find the position of the ``Last-Event-ID``, and fetch later events that are not in this process."""
        upstream, log = self.dispatcher.upstream, self.dispatcher.log
        while self.unresolved_id is not None and upstream is not None:
            if isinstance(log.parse(self.unresolved_id), str):
                await upstream.sync()
            with self.dispatcher.lock:
                offset = log.parse(self.unresolved_id)
                if isinstance(offset, str):
                    self.unresolved_id = None
                    self._reset(offset)
                    return
                self.position = self.delivered = offset
                self._epoch = log.epoch
                missing = log.missing(self._unread_channels(), offset)
            if missing:
                await upstream.recall(missing)
            with self.dispatcher.lock:
                if self._epoch != log.epoch:
                    continue  # the log was replaced while its events were fetched
                self.unresolved_id = None
                if not self._is_complete(self._unread_channels()):
                    self._reset("expired")

    @property
    def wants_snapshot(self) -> bool:
        """Whether a snapshot is to be made."""
        return self.snapshot is not None and self.snapshot.wanted

    async def make_snapshot(self) -> None:
        """Make the snapshot if the subscriber needs one.

        Raises:
            Exception: The function that makes the snapshot raised it.
        """
        if self.wants_snapshot and self.snapshot is not None:
            await self.snapshot.make(self.dispatcher.log.id_of)

    # Called by the subscription

    def check(self) -> None:
        """Reset or end the subscription if unread events were dropped."""
        if not self.has_unread:
            return
        if not self.dispatcher.log.is_complete(self._unread_channels(), clock(), patterns=False, after=self.position):
            # If making a snapshot always takes longer than the log keeps new events, it would be made for ever.
            if self._overflow == "close" or (self.snapshot is not None and self.snapshot.is_too_slow):
                self.ended = self.overflowed = True
            else:
                self._reset("overflow")

    def read(self, count: int = sys.maxsize, limit: int = sys.maxsize) -> list[Entry]:
        """Read the next events and advance the position.

        Args:
            count: The most events to read.
            limit: The most bytes to read. The first event may be larger.
        """
        batch: list[Entry] = []
        size = 0
        final = None if self.run is None else self.run.final
        for entry in self.dispatcher.log.entries(self._unread_channels(), self.position):
            size += len(entry.chunk)
            if final is not None and entry.offset > final:
                self.position = max(self.position, final)
                break  # the event belongs to a later run of the same name
            if batch and (size > limit or len(batch) >= count):
                break
            batch.append(entry)
            self.position = entry.offset
        else:
            self._set_read()
            if final is not None and self.dispatcher.log.last_offset >= final:
                self.position = max(self.position, final)  # a run may end without a final event
        if batch and self.snapshot is not None:
            self.snapshot.followed()
        return batch

    def take_joined(self, limit: int) -> bytes | None:
        """Deliver the next events of one whole channel as one chunk; nearly every event takes this way.

        All cursors at the same position share the chunk.

        Args:
            limit: The most bytes to take. The first event may be larger.

        Returns:
            The chunk, or ``None`` if this way cannot be taken. Then call `check` and `read`.
        """
        if self._plain_channel is None or self.reset_reason is not None:
            return None
        ring = self.dispatcher.log.ring(self._plain_channel)
        position = self.position
        if ring is None or position < ring.trimmed or ring.max_age != math.inf:
            return None
        chunk, count, position = ring.read(position, limit)
        self.position = self.delivered = position
        self.delivered_events += count
        self.has_unread = ring.has(position)
        return chunk

    def take_reset(self) -> ServerSentEvent:
        """Return the ``reset`` event, and clear `reset_reason`."""
        reason, self.reset_reason = self.reset_reason, None
        # If a snapshot follows, the client gets no id until it has the whole snapshot.
        self.delivered = None if self.snapshot is not None else self.position
        if self.delivered is None:
            self._initial_id = ""
        self._epoch = self.dispatcher.log.epoch
        event_id = "" if self.delivered is None else self.dispatcher.log.id_of(self.delivered)
        return ServerSentEvent({"reason": reason}, event="reset", id=event_id)

    def next_of_snapshot(self, snapshot: Snapshot) -> ServerSentEvent:
        """Deliver the next event of the snapshot."""
        event = snapshot.events.popleft()
        self.delivered_events += 1
        if not snapshot.events:
            self.delivered = snapshot.position
        return event

    def wants(self, entry: Entry) -> bool:
        """Return whether the filter accepts an event.

        Raises:
            Exception: The filter raised it.
        """
        if self._filter is None or self._filter(entry.event):
            return True
        # A client that misses the final event of a run would reconnect for ever.
        return self.run is not None and entry.offset == self.run.final

    @property
    def at_end(self) -> bool:
        """Whether the cursor reads a run and has reached its end."""
        return self.run is not None and self.run.final is not None and self.position >= self.run.final

    def _reset(self, reason: ResetReason) -> None:
        self.reset_reason = self.reset_reason or reason  # one event covers everything lost until it is delivered
        log = self.dispatcher.log
        run = self.run
        ring = None if run is None else log.ring(run.name)
        if run is not None and ring is not None:
            # The subscriber of a run wants all events that are left, above all the final one.
            self.position = max(ring.trimmed, run.start)
            return
        self.position = log.last_offset
        self._set_read()
        if self.snapshot is not None:
            self.snapshot.request(self.position)

    def _set_read(self) -> None:
        self.has_unread = False
        if self._dirty is not None:
            self._dirty.clear()

    def _unread_channels(self) -> set[str] | tuple[str]:
        return (self._channel,) if self._channel is not None else self._dirty or set()

    def _is_complete(self, channels: Iterable[str]) -> bool:
        # If a channel that matches a pattern was forgotten, its events are unknown.
        patterns = any(map(is_pattern, self.names))
        return self.dispatcher.log.is_complete(channels, clock(), patterns=patterns, after=self.position)


def _ignore() -> None:
    """Do nothing, because the subscription is not being read."""
