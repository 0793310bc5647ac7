"""`Subscription`: one reader's place in the log of a broker."""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from ..errors import StreamClosedError
from ..event import ServerSentEvent
from ..inbox import Changing
from ..log import is_pattern

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..log import Entry, ResetReason
    from ..stream import Stream
    from .hub import Hub

Overflow: TypeAlias = Literal["reset", "close"]

_BATCH: Final = 64


class Subscription(Changing):
    """What channels have behind a position, and all that follows: replay and live are one read.

    An async iterable of `ServerSentEvent`, each with its id; and, given to `EventSourceResponse`, a stream that has
    no task and no buffer of its own. To be read once, by one of the two.

    Where the log has dropped events that were not read, there is one event of the type ``reset`` instead, whose data
    says why (``{"reason": "expired"}``, ``unknown``, ``epoch`` or ``overflow``), and whose id is where it goes on.

    Attributes:
        names: The channels, and patterns of channels.
    """

    __slots__ = (
        "__weakref__", "_batch", "_begun_with", "_behind", "_channels", "_closed", "_filter", "_given", "_greets",
        "_hub", "_lost", "_overflow", "_position", "_some", "_stopped", "_stream", "_taken", "_used", "_wake", "names",
    )  # fmt: skip

    def __init__(
        self,
        hub: Hub,
        names: tuple[str, ...],
        *,
        last_event_id: str | None,
        filter: Callable[[ServerSentEvent], bool] | None,  # noqa: A002 (as it is called)
        overflow: Overflow,
    ) -> None:
        super().__init__()
        self.names = names
        self._hub = hub
        self._channels = [name for name in names if not is_pattern(name)]  # and those that patterns have matched
        self._some = len(self._channels) < len(names)
        self._filter = filter
        self._overflow = overflow
        self._begun_with = last_event_id or ""
        self._lost: ResetReason | None = None  # events are gone, and the reader is to be told
        self._greets = False  # its position is to be sent, before anything else
        self._used = self._closed = self._stopped = False
        self._stream: Stream | None = None
        self._wake: Callable[[], object] = self._notify
        self._taken = 0
        self._behind = True  # there may be something to read
        self._batch: deque[Entry] = deque()  # read, and not given yet
        self._given: int | None = None  # how far the reader has come; None: where it began
        with hub.lock:
            self._position = hub.log.tail
            place = hub.log.parse(last_event_id) if last_event_id else hub.log.tail
            if isinstance(place, int):
                self._position = self._given = place
            else:
                self._reset(place)

    @property
    def last_event_id(self) -> str:
        """The id of the event that was read last: a subscription that is begun with it goes on there."""
        return self._begun_with if self._given is None else self._hub.log.id_of(self._given)

    def __repr__(self) -> str:
        return f"<Subscription {' '.join(self.names)} at {self.last_event_id}>"

    # The hub's side

    def matched(self, channel: str) -> None:
        """See `hub.Reader`."""
        if channel not in self._channels:
            self._channels.append(channel)

    def published(self, number: int) -> None:
        """See `hub.Reader`."""
        if not self._behind:  # all before it is read, so that nothing of it can be missing
            self._behind = True
            self._position = number

    def wake(self) -> None:
        """See `hub.Reader`."""
        self._wake()

    # As an async iterable

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> ServerSentEvent:
        """The next event.

        Raises:
            StopAsyncIteration: It was closed; or events were lost, and its policy for that is ``close``.
            StreamClosedError: It is read by a response.
        """
        if self._stream is not None:
            raise StreamClosedError("this subscription is read by a response; subscribe once for each reader")
        if not self._used:
            self._begin()
        while not self._closed:
            event = self._next()
            if event is not None:
                return event
            if not self._closed:
                await self._change()
        raise StopAsyncIteration

    def _next(self) -> ServerSentEvent | None:
        while True:
            while self._batch:
                entry = self._batch.popleft()
                self._given = entry.number
                if self._filter is None or self._filter(entry.event):
                    self._taken += 1
                    return entry.event
            with self._hub.lock:
                self._check()
                if self._lost is not None:
                    return self._reset_event()
                if self._closed or not self._read(_BATCH):
                    return None

    async def aclose(self) -> None:
        """Read no more."""
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._hub.leave(self)
        self._notify()

    def _begin(self) -> None:
        if self._used:
            raise StreamClosedError("this subscription was read before; subscribe once for each reader")
        self._used = True
        self._behind = True  # before it is woken for the first time: what was published since it was made counts
        self._hub.join(self)
        with self._hub.lock:
            # A channel that a pattern matches may have been forgotten: then nobody knows what it had.
            if not self._hub.log.is_complete(self._channels, patterns=self._some, after=self._position):
                self._reset("expired")

    # As the feed of a stream (stream.Live)

    def as_live(self) -> Subscription:
        """This, as what a stream pulls from."""
        self._begin()
        self._greets = True  # so that a client which leaves before its first event has a place to resume from
        return self

    def joined(self, stream: Stream) -> None:
        """`stream` is the one that pulls."""
        self._stream = stream

    def attach(self, wake: Callable[[], object]) -> None:
        """See `stream.Live`."""
        self._wake = wake

    def detach(self) -> None:
        """See `stream.Live`."""
        self._wake = _nothing
        self._stream = None
        self._close()

    def stop(self) -> None:
        """See `stream.Live`."""
        self._stopped = True

    @property
    def pushed(self) -> int:
        """How many events were taken."""
        return self._taken

    @property
    def at_boundary(self) -> bool:
        """Always: it gives whole events."""
        return True

    @property
    def ready(self) -> bool:
        """Whether there is anything to take."""
        return not self._stopped and (self._behind or self._greets or self._lost is not None)

    def take(self, limit: int) -> bytes:
        """See `outbox.Feed`."""
        with self._hub.lock:
            self._check()
            greets, self._greets = self._greets, False
            if self._lost is not None:
                return self._reset_event().encode()
            if greets:
                self._given = self._position
                return ServerSentEvent(id=self._hub.log.id_of(self._position)).encode()
            if self._closed:
                return b""
            if len(self._channels) == 1 and self._filter is None:
                return self._take_of_one(limit)
            self._read(limit=limit)
        batch, self._batch = self._batch, deque()
        chunks = [entry.chunk for entry in batch if self._filter is None or self._filter(entry.event)]
        self._given = self._position
        self._taken += len(chunks)
        return b"".join(chunks)

    def _take_of_one(self, limit: int) -> bytes:
        ring = self._hub.log.ring(self._channels[0])
        if ring is None or not ring.has(self._position):
            self._behind = False
            return b""
        chunk, self._position = ring.read(self._position, limit)
        self._given = self._position
        self._taken += 1
        self._behind = ring.has(self._position)
        return chunk

    def sent(self) -> None:
        """See `outbox.Feed`."""

    # The log

    def _read(self, count: int = sys.maxsize, limit: int = sys.maxsize) -> bool:
        """Read what is next into the batch: so many events and bytes at the most, or one larger event."""
        size = 0
        for entry in self._hub.log.entries(self._channels, self._position):
            size += len(entry.chunk)
            if self._batch and (size > limit or len(self._batch) >= count):
                return True
            self._batch.append(entry)
            self._position = entry.number
        self._behind = False
        return bool(self._batch)

    def _check(self) -> None:
        if self._behind and not self._hub.log.is_complete(self._channels, patterns=False, after=self._position):
            if self._overflow == "close":
                self._closed = self._stopped = True
                if self._stream is not None:
                    stream = self._stream
                    stream.loop.call_soon(lambda: stream.close("overflowed"))
            else:
                self._reset("overflow")

    def _reset(self, reason: ResetReason) -> None:
        self._lost = self._lost or reason  # one event for all that was lost until it is read
        self._position = self._hub.log.tail
        self._behind = False

    def _reset_event(self) -> ServerSentEvent:
        reason, self._lost = self._lost, None
        self._given = self._position
        return ServerSentEvent({"reason": reason}, event="reset", id=self._hub.log.id_of(self._position))


def _nothing() -> None:
    """Nobody listens."""
