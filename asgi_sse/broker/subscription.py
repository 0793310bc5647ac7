"""`Subscription`: what channels have behind a place, and all that follows, given out one way or the other."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Final

import anyio.lowlevel

from asgi_sse.errors import StreamClosedError, printable
from asgi_sse.protocol.event import ServerSentEvent
from asgi_sse.runtime.current import current_loop, running_loop

from .cursor import Cursor, Overflow
from .snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import TracebackType
    from typing import Self

    from asgi_sse.runtime.base import EventLoop
    from asgi_sse.stream.stream import Stream

    from .dispatcher import Dispatcher
    from .presence import Presence
    from .ring import Entry, Ring
    from .runs.run import Run

_BATCH: Final = 64


class Subscription(Cursor):
    """What channels have behind a place, and all that follows: replay and live are one read.

    An async iterable of `ServerSentEvent`, each with its id; and, given to `EventSourceResponse`, a stream that has
    no task and no buffer of its own (its events are encoded with LF, whatever the response's ``sep``). To be read
    once, by one of the two. It begins when it is read first, and ends with the loop or response that reads it, or by
    `aclose`.

    Where the log has dropped events that were not read, there is one event of the type ``reset`` instead, whose data
    says why (``{"reason": "expired"}``, ``unknown``, ``epoch`` or ``overflow``), and whose id is where it goes on.

    Attributes:
        names: The channels, and patterns of channels.
        info: What was given to `Broker.subscribe` as such.
    """

    __slots__ = (
        "__weakref__", "_batch", "_begun_with", "_checkpoint", "_greets", "_loop", "_plain", "_presence", "_stopped",
        "_stream", "_taken", "_wake", "info",
    )  # fmt: skip

    def __init__(
        self,
        dispatcher: Dispatcher,
        names: tuple[str, ...],
        *,
        last_event_id: str | None,
        filter: Callable[[ServerSentEvent], bool] | None,  # noqa: A002 (as it is called)
        overflow: Overflow,
        checkpoint: bool,
        snapshot: Callable[[], Any] | None,
        presence: Presence | None,
        info: Any,
        run: Run | None = None,
    ) -> None:
        made = None if snapshot is None else Snapshot(snapshot)
        super().__init__(
            dispatcher, names, last_event_id=last_event_id, filter=filter, overflow=overflow, snapshot=made, run=run
        )
        self.info = info
        self._checkpoint = checkpoint
        self._presence = presence
        self._begun_with = last_event_id or ""
        self._greets = False  # its position is to be sent, before anything else
        self._stopped = False
        self._loop: EventLoop | None = None  # in which it is read
        self._stream: Stream | None = None
        self._wake: Callable[[], object] = self._notify
        self._taken = 0
        plain = filter is None and run is None and snapshot is None
        self._plain = self._single if plain else None  # the channel, if all its events are wanted as they are
        self._batch: list[Entry] = []  # read and not given yet, the next one last

    @property
    def last_event_id(self) -> str:
        """The id of the event that was read last: a subscription that is begun with it goes on there."""
        return self._begun_with if self._given is None else f"{self._epoch}-{self._given}"

    def __repr__(self) -> str:
        return f"<Subscription {printable(' '.join(self.names))} at {printable(self.last_event_id)}>"

    def unread(self, beyond: int) -> int:
        """See `dispatcher.Reader`."""
        return super().unread(beyond - len(self._batch)) + len(self._batch)

    def wake(self) -> None:
        """See `dispatcher.Reader`."""
        self._wake()

    async def prepare(self) -> None:
        """Make its snapshot now, if it begins with one. Without, that is made when it is read.

        Of a broker of several machines, what it resumes behind is looked for first, once it is read.

        Raises:
            Exception: What making it raised.
        """
        if self._asked is not None and self._loop is not None:
            await self._settle()
        if self._snapshot is not None and self._snapshot.wanted:
            await self._snapshot.make(self._dispatcher.log.id_of)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    async def aclose(self) -> None:
        """Read no more; a response that reads it ends. From any event loop."""
        if self._loop is None or self._loop is running_loop() or not self._loop.call_threadsafe(self._close):
            self._close()

    def leave_soon(self) -> None:
        """Nobody reads it any more. May be called anywhere, with the dispatcher's lock held too."""
        if self._loop is not None and not self._closed:
            self._loop.call_threadsafe(self._close)

    def broker_closes(self) -> None:
        """See `dispatcher.Reader`: a response is ended by its registry, and a run ends by itself."""
        if self._stream is None and self._run is None:
            self.leave_soon()

    def _begin(self) -> None:
        if self._loop is not None:
            raise StreamClosedError("this subscription was read before; subscribe once for each reader")
        if self._closed:
            raise StreamClosedError("this subscription was closed before it was read")
        self._loop = current_loop()
        self._dispatcher.join(self)
        if self._presence is not None:
            self._presence.joined(self)

    def _close(self) -> None:
        self._closed = self._stopped = True
        if self._stream is not None:
            self._stream.loop.call_soon(self._stream.finish)
        if self._dispatcher.leave(self) and self._presence is not None:
            self._presence.left(self)
        self._notify()

    def _reset_event(self) -> ServerSentEvent:
        event = super()._reset_event()
        if self._given is None:
            self._begun_with = ""
        return event

    # As an async iterable

    def __aiter__(self) -> AsyncIterator[ServerSentEvent]:
        return _Iterator(self)

    async def __anext__(self) -> ServerSentEvent:
        """The next event.

        Raises:
            StopAsyncIteration: It was closed; the run that it reads has ended; or events were lost, and its policy for
                that is ``close``.
            StreamClosedError: It is read by a response.
            Exception: What making its snapshot raised.
        """
        if self._stream is not None:
            raise StreamClosedError("this subscription is read by a response; subscribe once for each reader")
        if self._loop is None and not self._closed:
            self._begin()
        has_waited = False
        while not self._closed:
            if self._lost is None or self._asked is not None:
                await self.prepare()
            if not self._batch and not has_waited:
                await anyio.lowlevel.checkpoint()  # once a batch, or who publishes as fast would starve all others
            event = self._next()
            if event is not None:
                return event
            if not self._closed:
                await self._change()
                has_waited = True
        raise StopAsyncIteration

    def _next(self) -> ServerSentEvent | None:
        if self._snapshot is not None and self._snapshot.events and self._lost is None:
            return self._next_of(self._snapshot)
        while True:
            while self._batch and self._lost is None:
                wanted = self._wanted(self._batch[-1])
                entry = self._batch.pop()
                self._given = entry.offset
                if wanted:
                    self._taken += 1
                    return entry.event
            with self._dispatcher.lock:
                self._check()
                if self._lost is not None:
                    self._batch = []
                    return self._reset_event()
                self._closed = self._closed or self._at_end()
                if not self._closed:
                    self._batch = self._read_on(_BATCH)[::-1]
            if self._closed:
                self._close()
            if not self._batch:
                return None

    def _read_on(self, count: int = sys.maxsize, limit: int = sys.maxsize) -> list[Entry]:
        batch = self._read(count, limit)
        if batch and self._snapshot is not None:
            self._snapshot.was_followed()
        return batch

    def _next_of(self, snapshot: Snapshot) -> ServerSentEvent:
        event = snapshot.events.popleft()
        self._taken += 1
        if not snapshot.events:
            self._given = snapshot.position
        return event

    # As the feed of a stream (stream.PullSource)

    def as_pull_source(self) -> Subscription:
        """This, as what a stream pulls from."""
        self._begin()
        # So that a client which leaves before its first event has a place to resume from; unless it gets a snapshot,
        # whose end is that place.
        self._greets = self._snapshot is None or not (self._snapshot.wanted or self._snapshot.events)
        return self

    def joined(self, stream: Stream) -> None:
        """See `stream.PullSource`."""
        self._stream = stream
        self._get_ready()

    def attach(self, wake: Callable[[], object]) -> None:
        """See `stream.PullSource`."""
        self._wake = wake

    def detach(self) -> None:
        """See `stream.PullSource`."""
        self._wake = _nothing
        self._stream = None
        self._close()

    def stop(self) -> None:
        """See `stream.PullSource`."""
        self._stopped = True

    @property
    def pending(self) -> bool:
        """See `stream.PullSource`: a snapshot that fails may have a status of its own."""
        return self._snapshot is not None and self._snapshot.wanted and self._lost is None

    @property
    def patient(self) -> bool:
        """See `stream.PullSource`: what reads a run has the time of a drain to see its end."""
        return self._run is not None

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
        if self._stopped or self._asked is not None:
            return False
        if self._greets or self._lost is not None:
            return True
        if self._snapshot is not None and (self._snapshot.wanted or self._snapshot.events):
            return not self._snapshot.wanted
        return self._behind

    def take(self, limit: int) -> bytes:
        """See `feed.Feed`."""
        greets, self._greets = self._greets, False
        snapshot = self._snapshot
        if snapshot is not None and snapshot.events and self._lost is None:
            return self._take_of(snapshot, limit)
        with self._dispatcher.lock:
            if self._plain is not None and not greets and self._lost is None:
                ring = self._dispatcher.log.ring(self._plain)
                if ring is not None and self._position >= ring.trimmed and ring.max_age == math.inf:
                    return self._take_of_ring(ring, limit)
            self._check()
            if self._lost is not None:
                event = self._reset_event()
                self._get_ready()
                self._see_end()
                return event.encode()
            if greets:
                self._given = self._position
                return ServerSentEvent(id=self._dispatcher.log.id_of(self._position)).encode()
            if self._closed:
                return b""
            batch = self._read_on(limit=limit)
            self._given = self._position
            self._see_end()
        return b"".join(self._chunks_of(batch))

    def _take_of_ring(self, ring: Ring, limit: int) -> bytes:
        """The way of nearly every event: of one channel, as it is, joined once for all who are at the same place."""
        chunk, count, self._position = ring.read(self._position, limit)
        self._given = self._position
        self._taken += count
        self._behind = ring.has(self._position)
        return chunk

    def _chunks_of(self, batch: list[Entry]) -> list[bytes]:
        chunks: list[bytes] = []
        try:
            for entry in batch:
                if self._wanted(entry):
                    chunks.append(entry.chunk)  # noqa: PERF401 (what was wanted before it raised is sent)
        except Exception as exc:  # told as the filter's: an OSError would be taken for the client's leaving
            self._stopped = True
            stream, error = self._stream, exc
            if stream is None:
                raise
            stream.loop.call_soon(lambda: stream.fail(error))
        self._taken += len(chunks)
        return chunks

    def _take_of(self, snapshot: Snapshot, limit: int) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while snapshot.events:
            chunk = snapshot.events[0].encode()
            size += len(chunk)
            if chunks and size > limit:
                break
            chunks.append(chunk)
            self._next_of(snapshot)
        return b"".join(chunks)

    def sent(self) -> None:
        """See `feed.Feed`."""

    def keep_alive(self) -> bytes:
        """See `stream.PullSource`: where all there is was read, the place up to which that is so."""
        if not self._checkpoint or self._given is None:
            return b""
        with self._dispatcher.lock:
            if self.ready or self._behind or self._stopped:
                return b""
            self._given = self._position = self._dispatcher.log.last_offset
        return ServerSentEvent(id=self._dispatcher.log.id_of(self._position)).encode()

    def _see_end(self) -> None:
        if not self._closed and self._at_end():
            self._closed = self._stopped = True  # what a later run of that name publishes is not for this reader
            if self._stream is not None:
                self._stream.loop.call_soon(self._stream.finish)

    def _overflowed(self) -> None:
        super()._overflowed()
        self._stopped = True
        if self._stream is not None:
            stream = self._stream
            stream.loop.call_soon(lambda: stream.close("overflowed"))

    def _get_ready(self) -> None:
        wanted = self._asked is not None or (self._snapshot is not None and self._snapshot.wanted)
        if self._stream is not None and wanted:
            self._stream.start_helper(self._prepare_and_wake)

    async def _prepare_and_wake(self) -> None:
        await self.prepare()
        if self._stream is not None:
            self._stream.open()
        self._wake()


class _Iterator:
    """Iterates over a subscription, and closes it where it is left with a ``break`` or an error."""

    __slots__ = ("_subscription",)

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    def __aiter__(self) -> AsyncIterator[ServerSentEvent]:
        return self

    def __anext__(self) -> Any:
        return self._subscription.__anext__()

    async def aclose(self) -> None:
        """Read no more."""
        await self._subscription.aclose()

    def __del__(self) -> None:
        self._subscription.leave_soon()


def _nothing() -> None:
    """Nobody listens."""
