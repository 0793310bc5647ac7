"""`SubscriptionSource`: lets a stream pull the events of a subscription."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from asgi_sse.protocol.event import ServerSentEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_sse.stream.stream import Stream

    from .cursor import Cursor
    from .ring import Entry
    from .snapshot import Snapshot


class Closable(Protocol):
    """What the source needs of its subscription."""

    def close(self) -> None:
        """End the subscription."""
        ...


class SubscriptionSource:
    """The `PullSource` of a stream that sends the events of a subscription.

    It has no task, queue or buffer of its own: the stream takes encoded events from the log when its client can
    receive more.

    Args:
        cursor: The read position.
        subscription: Closed when the stream is over.
        checkpoint: Whether keep-alives carry the id up to which the client has everything.
    """

    __slots__ = ("_checkpoint", "_cursor", "_sends_position", "_stopped", "_stream", "_subscription")

    def __init__(self, cursor: Cursor, subscription: Closable, *, checkpoint: bool) -> None:
        snapshot = cursor.snapshot
        self._cursor = cursor
        self._subscription: Closable | None = subscription
        self._checkpoint = checkpoint
        self._stopped = False
        self._stream: Stream | None = None
        # The first chunk is an id, so that a client which leaves before its first event can resume. A snapshot ends
        # with that id.
        self._sends_position = snapshot is None or not (snapshot.wanted or snapshot.events)

    # The stream's side, as in `PullSource`

    def attach(self, wake: Callable[[], object]) -> None:
        """Call `wake` when there is something to take."""
        self._cursor.on_wake = wake

    def joined(self, stream: Stream) -> None:
        """Serve `stream`."""
        self._stream = stream
        self._prepare_if_needed()

    def detach(self) -> None:
        """Close the subscription, since its stream is over."""
        self._stream = None
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.close()

    def stop(self) -> None:
        """Give no more events; the client can resume with the events that were not taken."""
        self._stopped = True

    @property
    def pending(self) -> bool:
        """Whether the first snapshot is being made. If that fails, the response may have another status."""
        return self._cursor.wants_snapshot and self._cursor.reset_reason is None

    @property
    def patient(self) -> bool:
        """Whether the source ends by itself within the grace of a drain: a run does."""
        return self._cursor.run is not None

    @property
    def pushed(self) -> int:
        """The number of events taken so far."""
        return self._cursor.delivered_events

    @property
    def at_boundary(self) -> bool:
        """Always true: every chunk consists of whole events."""
        return True

    @property
    def ready(self) -> bool:
        """Whether there is anything to take."""
        cursor = self._cursor
        if self._stopped or cursor.unresolved_id is not None:
            return False
        if self._sends_position or cursor.reset_reason is not None:
            return True
        snapshot = cursor.snapshot
        if snapshot is not None and (snapshot.wanted or snapshot.events):
            return not snapshot.wanted
        return cursor.has_unread

    def take(self, limit: int) -> bytes:
        """Take whole events of at most `limit` bytes, or one larger event."""
        cursor = self._cursor
        sends_position = self._sends_position
        if sends_position:
            self._sends_position = False
        snapshot = cursor.snapshot
        if snapshot is not None and snapshot.events and cursor.reset_reason is None:
            return self._take_snapshot(snapshot, limit)
        with cursor.dispatcher.lock:
            if not sends_position:
                chunk = cursor.take_joined(limit)
                if chunk is not None:
                    return chunk
            cursor.check()
            if cursor.overflowed:
                self._close_stream_as_overflowed()
            if cursor.reset_reason is not None:
                event = cursor.take_reset()
                self._prepare_if_needed()
                self._end_with_run()
                return event.encode()
            if sends_position:
                cursor.delivered = cursor.position
                return self._position_block()
            if cursor.ended:
                return b""
            batch = cursor.read(limit=limit)
            cursor.delivered = cursor.position
            self._end_with_run()
        return b"".join(self._wanted_chunks(batch))

    def sent(self) -> None:
        """Do nothing: no event waits to be sent."""

    def keep_alive(self) -> bytes:
        """Return the id up to which the client has everything, if checkpoints were asked for."""
        cursor = self._cursor
        if not self._checkpoint or cursor.delivered is None:
            return b""
        with cursor.dispatcher.lock:
            if self.ready or cursor.has_unread or self._stopped:
                return b""
            cursor.delivered = cursor.position = cursor.dispatcher.log.last_offset
            return self._position_block()

    # The subscription's side

    def subscription_closed(self) -> None:
        """Give no more events and end the stream."""
        self._stopped = True
        if self._stream is not None:
            self._stream.loop.call_soon(self._stream.finish)

    def _take_snapshot(self, snapshot: Snapshot, limit: int) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while snapshot.events:
            chunk = snapshot.events[0].encode()
            size += len(chunk)
            if chunks and size > limit:
                break
            chunks.append(chunk)
            self._cursor.next_of_snapshot(snapshot)
        return b"".join(chunks)

    def _position_block(self) -> bytes:
        cursor = self._cursor
        return ServerSentEvent(id=cursor.dispatcher.log.id_of(cursor.position)).encode()

    def _wanted_chunks(self, batch: list[Entry]) -> list[bytes]:
        chunks: list[bytes] = []
        try:
            for entry in batch:
                if self._cursor.wants(entry):
                    chunks.append(entry.chunk)  # noqa: PERF401 (events before one on which the filter raises are sent)
        except Exception as exc:
            # The error is reported as the filter's, because the writer would take an OSError for a disconnect.
            self._stopped = True
            if self._stream is None:
                raise
            self._stream.loop.call_soon(partial(self._stream.fail, exc))
        self._cursor.delivered_events += len(chunks)
        return chunks

    def _end_with_run(self) -> None:
        cursor = self._cursor
        if not cursor.ended and cursor.at_end:
            cursor.ended = True  # events of a later run of the same name are not for this subscriber
            self.subscription_closed()

    def _close_stream_as_overflowed(self) -> None:
        self._stopped = True
        if self._stream is not None:
            self._stream.loop.call_soon(partial(self._stream.close, "overflowed"))

    def _prepare_if_needed(self) -> None:
        cursor = self._cursor
        if self._stream is not None and (cursor.unresolved_id is not None or cursor.wants_snapshot):
            self._stream.start_helper(self._prepare_and_wake)

    async def _prepare_and_wake(self) -> None:
        await self._cursor.resolve()
        await self._cursor.make_snapshot()
        if self._stream is not None:
            self._stream.open()
        self._cursor.wake()
