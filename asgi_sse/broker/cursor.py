"""`Cursor`: a place in the log of a broker, and the rules by which it moves on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from asgi_sse.protocol.event import ServerSentEvent
from asgi_sse.stream.receiver import Changing

from .dispatcher import clock
from .patterns import is_pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .dispatcher import Dispatcher
    from .log import ResetReason
    from .ring import Entry
    from .runs.run import Run
    from .snapshot import Snapshot

Overflow: TypeAlias = Literal["reset", "close"]


class Cursor(Changing):
    """What is behind it is unread; where that is not complete any more, it is reset.

    What is read is settled here, with the dispatcher's lock held; how it is given out, by `Subscription`.

    Attributes:
        names: The channels, and patterns of channels.
    """

    __slots__ = (
        "_asked",
        "_behind",
        "_closed",
        "_dirty",
        "_dispatcher",
        "_epoch",
        "_filter",
        "_given",
        "_lost",
        "_overflow",
        "_position",
        "_run",
        "_single",
        "_snapshot",
        "names",
    )  # fmt: skip

    def __init__(
        self,
        dispatcher: Dispatcher,
        names: tuple[str, ...],
        *,
        last_event_id: str | None,
        filter: Callable[[ServerSentEvent], bool] | None,  # noqa: A002 (as it is called)
        overflow: Overflow,
        snapshot: Snapshot | None,
        run: Run | None = None,
    ) -> None:
        super().__init__()
        self.names = names
        self._dispatcher = dispatcher
        self._single = names[0] if len(names) == 1 and not is_pattern(names[0]) else None
        self._dirty: set[str] | None = None  # of several channels, those that may have something to read
        self._behind = True  # there may be something to read
        self._filter = filter
        self._overflow = overflow
        self._snapshot = snapshot
        self._run = run
        self._lost: ResetReason | None = None  # events are gone, and the reader is to be told
        self._closed = False
        self._given: int | None = None  # how far the reader has come; None: where it began
        # Where to begin, while it is not known whether all behind it is here, or can be had from upstream.
        self._asked: str | None = None
        with dispatcher.lock:
            log = dispatcher.log
            self._epoch = log.epoch  # of that place; the log may be another one before the reader is told
            if last_event_id:
                place = log.parse(last_event_id)
                if isinstance(place, int):
                    self._position = self._given = place
                elif dispatcher.upstream is not None:  # it may be ahead of us
                    self._asked = last_event_id
                    self._position = log.last_offset
                else:
                    self._reset(place)
            else:
                self._position = log.last_offset if run is None else run.start
                if run is not None and not run.lease.whole:
                    self._lost = "expired"  # it goes on at what is left
                if snapshot is None:
                    self._given = self._position
                else:
                    snapshot.want(self._position)

    # The dispatcher's side

    def begun(self, channels: list[str]) -> None:
        """See `dispatcher.Reader`."""
        self._behind = True  # before it is woken for the first time: what was published since it was made counts
        if self._single is None:
            self._dirty = set(channels)
        if self._asked is not None:
            return
        if self._epoch != self._dispatcher.log.epoch:
            self._reset("epoch")
        elif not self._is_complete(channels):
            if self._dispatcher.upstream is None or (self._lost is not None and self._run is None):
                self._reset("expired")
            else:
                self._asked = self._dispatcher.log.id_of(self._position)

    def missed(self, channel: str) -> bool:
        """See `dispatcher.Reader`."""
        if self._dirty is not None:
            self._dirty.add(channel)
        was_behind, self._behind = self._behind, True
        return not was_behind

    def restarted(self, channels: list[str], *, same: bool) -> bool:
        """See `dispatcher.Reader`."""
        if self._asked is not None:  # it may be of the log that there is from now on: that is being found out
            if self._dirty is not None:
                self._dirty.update(channels)
            return False
        if same and self._is_complete(channels):
            return False
        self._reset("expired" if same else "epoch")
        return True

    async def _settle(self) -> None:
        """Find out where it begins, and see that all behind that is here."""
        upstream, log = self._dispatcher.upstream, self._dispatcher.log
        while self._asked is not None and upstream is not None:
            if isinstance(log.parse(self._asked), str):
                await upstream.sync()
            with self._dispatcher.lock:
                place = log.parse(self._asked)
                if isinstance(place, str):
                    self._asked = None
                    self._reset(place)
                    return
                self._position = self._given = place
                self._epoch = log.epoch
                missing = log.missing(self._channels(), place)
            if missing:
                await upstream.recall(missing)
            with self._dispatcher.lock:
                if self._epoch != log.epoch:
                    continue  # what was recalled is of a log that there is no more
                self._asked = None
                if not self._is_complete(self._channels()):
                    self._reset("expired")

    def _is_complete(self, channels: Iterable[str]) -> bool:
        # A channel that a pattern matches may have been forgotten: then nobody knows what it had.
        patterns = any(map(is_pattern, self.names))
        return self._dispatcher.log.is_complete(channels, clock(), patterns=patterns, after=self._position)

    def published(self, channel: str, before: int) -> bool:
        """See `dispatcher.Reader`."""
        if self._dirty is not None:
            self._dirty.add(channel)
        if self._behind:
            return False
        self._behind = True
        self._position = before  # all before it is read, so that nothing of it can be missing
        return True

    def unread(self, beyond: int) -> int:
        """See `dispatcher.Reader`."""
        log = self._dispatcher.log
        # What is cheap to know comes first: while this is counted, nobody publishes.
        if not self._behind or self._asked is not None or log.last_offset - self._position <= beyond:
            return 0
        return log.count(self._channels(), self._position)

    # The log; with the dispatcher's lock held

    def _channels(self) -> set[str] | tuple[str]:
        return (self._single,) if self._single is not None else self._dirty or set()

    def _read(self, count: int = sys.maxsize, limit: int = sys.maxsize) -> list[Entry]:
        """What is next: so many events and bytes at the most, or one larger event."""
        batch: list[Entry] = []
        size = 0
        final = None if self._run is None else self._run.final
        for entry in self._dispatcher.log.entries(self._channels(), self._position):
            size += len(entry.chunk)
            if final is not None and entry.offset > final:
                self._position = max(self._position, final)
                break  # of a later run of that name
            if batch and (size > limit or len(batch) >= count):
                break
            batch.append(entry)
            self._position = entry.offset
        else:
            self._caught_up()
            if final is not None and self._dispatcher.log.last_offset >= final:
                self._position = max(self._position, final)  # which may be no event
        return batch

    def _caught_up(self) -> None:
        self._behind = False
        if self._dirty is not None:
            self._dirty.clear()

    def _check(self) -> None:
        """See whether what is behind it is complete."""
        if not self._behind:
            return
        if not self._dispatcher.log.is_complete(self._channels(), clock(), patterns=False, after=self._position):
            # A snapshot that takes longer than the log keeps what comes meanwhile would be made for ever.
            if self._overflow == "close" or (self._snapshot is not None and self._snapshot.is_too_slow):
                self._overflowed()
            else:
                self._reset("overflow")

    def _overflowed(self) -> None:
        self._closed = True

    def _reset(self, reason: ResetReason) -> None:
        self._lost = self._lost or reason  # one event for all that was lost until it is read
        log = self._dispatcher.log
        ring = None if self._run is None else log.ring(self._run.name)
        if ring is not None:
            # Of a run, whatever is left is wanted, its end above all.
            self._position = max(ring.trimmed, cast("Run", self._run).start)
            return
        self._position = log.last_offset
        self._caught_up()
        if self._snapshot is not None:
            self._snapshot.want(self._position)

    def _reset_event(self) -> ServerSentEvent:
        reason, self._lost = self._lost, None
        # With a snapshot to come, the client is to have no id until it has all of that.
        self._given = None if self._snapshot is not None else self._position
        self._epoch = self._dispatcher.log.epoch
        place = "" if self._given is None else self._dispatcher.log.id_of(self._given)
        return ServerSentEvent({"reason": reason}, event="reset", id=place)

    def _at_end(self) -> bool:
        """Whether it reads a run, and has come to its end."""
        return self._run is not None and self._run.final is not None and self._position >= self._run.final

    def _wanted(self, entry: Entry) -> bool:
        if self._filter is None or self._filter(entry.event):
            return True
        return self._run is not None and entry.offset == self._run.final  # who misses that one never stops
