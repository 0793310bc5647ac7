"""`Subscription`: the events of channels after a cursor, first the replayed and then the live ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio.lowlevel

from asgi_sse.errors import StreamClosedError, printable
from asgi_sse.runtime.condition import ChangeNotifier
from asgi_sse.runtime.current import current_loop, running_loop

from .cursor import Cursor, Overflow, RunSpan
from .pull_source import SubscriptionSource
from .snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import TracebackType
    from typing import Self

    from asgi_sse.protocol.event import ServerSentEvent
    from asgi_sse.runtime.base import EventLoop

    from .dispatcher import Dispatcher
    from .presence import Presence

_BATCH_EVENTS: Final = 64
"""Events that the async iterator reads from the log at a time."""


class Subscription(ChangeNotifier):
    """The events of channels after a position: first the ones in the log, then new ones as they are published.

    A subscription can be read in two ways, but only once and by one reader:

    - As an async iterable of `ServerSentEvent`, each with its id.
    - By an `EventSourceResponse`, which pulls encoded events from the log. This needs no task and no buffer. The
      lines of these events end with LF, whatever the response's ``sep`` is.

    The subscription begins with the first read. It ends with the loop or the response that reads it, or by `aclose`.

    If the log has dropped events that were not read, the subscriber gets one event of the type ``reset`` instead. Its
    data has the reason, ``{"reason": "expired"}``, ``unknown``, ``epoch`` or ``overflow``. Its id is the position at
    which the subscription continues.

    Make one with `Broker.subscribe`, `Channel.subscribe` or `Run.subscribe`.

    Attributes:
        info: The `info` that was passed to ``subscribe``.
    """

    __slots__ = ("__weakref__", "_checkpoint", "_cursor", "_loop", "_presence", "_source", "info")

    def __init__(
        self,
        dispatcher: Dispatcher,
        names: tuple[str, ...],
        *,
        last_event_id: str | None,
        filter: Callable[[ServerSentEvent], bool] | None,  # noqa: A002 (named after the argument of `Broker.subscribe`)
        overflow: Overflow,
        checkpoint: bool,
        snapshot: Callable[[], Any] | None,
        presence: Presence | None,
        info: Any,
        run: RunSpan | None = None,
    ) -> None:
        super().__init__()
        self._cursor = Cursor(
            dispatcher,
            names,
            last_event_id=last_event_id,
            filter=filter,
            overflow=overflow,
            snapshot=None if snapshot is None else Snapshot(snapshot),
            run=run,
        )
        self.info: Any = info
        self._checkpoint = checkpoint
        self._presence = presence
        self._loop: EventLoop | None = None  # the loop in which the subscription is read
        self._source: SubscriptionSource | None = None  # while a response reads

    @property
    def names(self) -> tuple[str, ...]:
        """The channels, and patterns of channels."""
        return self._cursor.names

    @property
    def last_event_id(self) -> str:
        """The id of the last event that was read. A subscription that begins with this id continues here."""
        return self._cursor.last_event_id

    def __repr__(self) -> str:
        return f"<Subscription {printable(' '.join(self.names))} at {printable(self.last_event_id)}>"

    async def prepare(self) -> None:
        """Make the first snapshot now, if there is one, instead of when the subscription is first read.

        Raises:
            Exception: The `snapshot` function raised it.
        """
        if self._loop is not None:
            await self._cursor.resolve()
        await self._cursor.make_snapshot()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def aclose(self) -> None:
        """Stop reading; a response that reads the subscription ends. May be called in any event loop."""
        if self._loop is None or self._loop is running_loop() or not self._loop.call_threadsafe(self.close):
            self.close()

    def close_soon(self) -> None:
        """Call `close` in the subscription's event loop. May be called anywhere, even with the lock."""
        if self._loop is not None and not self._cursor.ended:
            self._loop.call_threadsafe(self.close)

    def close(self) -> None:
        """Stop reading; a response that reads the subscription ends. Call it in the event loop of the subscription."""
        cursor = self._cursor
        cursor.release()
        source, self._source = self._source, None
        if source is not None:
            source.subscription_closed()
        if cursor.dispatcher.remove(cursor) and self._presence is not None:
            self._presence.call_on_leave(self)
        self.notify_changed()

    def broker_closing(self) -> None:
        """Close the subscription. But its registry ends a response, and a run ends by itself."""
        if self._source is None and self._cursor.run is None:
            self.close_soon()

    def as_pull_source(self) -> SubscriptionSource:
        """Begin to read for a stream.

        Raises:
            FullError: A channel has as many subscribers as `max_subscribers` allows.
            StreamClosedError: The subscription was read or closed before.
        """
        self._begin()
        self._source = SubscriptionSource(self._cursor, self, checkpoint=self._checkpoint)
        return self._source

    def _begin(self) -> None:
        if self._loop is not None:
            raise StreamClosedError("this subscription was read before; subscribe once for each reader")
        if self._cursor.ended:
            raise StreamClosedError("this subscription was closed before it was read; subscribe again")
        self._loop = current_loop()
        self._cursor.owner = self
        self._cursor.on_wake = self.notify_changed
        self._cursor.dispatcher.add(self._cursor)
        if self._presence is not None:
            self._presence.call_on_join(self)

    # As an async iterable

    def __aiter__(self) -> AsyncIterator[ServerSentEvent]:
        return _Iterator(self)

    async def __anext__(self) -> ServerSentEvent:
        """Wait for the next event.

        Raises:
            StopAsyncIteration: The subscription was closed, its run has ended, or events were lost and the broker's
                `overflow` is ``close``.
            StreamClosedError: A response reads the subscription.
            Exception: The `snapshot` or `filter` function raised it.
        """
        cursor = self._cursor
        if self._source is not None:
            raise StreamClosedError("this subscription is read by a response; subscribe once for each reader")
        if self._loop is None and not cursor.ended:
            self._begin()
        has_waited = False
        while not cursor.ended:
            if cursor.unresolved_id is not None or (cursor.reset_reason is None and cursor.wants_snapshot):
                await self.prepare()
            if not cursor.batch and not has_waited:
                # Once a batch. Otherwise a loop that publishes as fast as it reads would starve all others.
                await anyio.lowlevel.checkpoint()
            event = self._next()
            if event is not None:
                return event
            if not cursor.ended:
                await self.wait_changed()
                has_waited = True
        raise StopAsyncIteration

    def _next(self) -> ServerSentEvent | None:
        cursor = self._cursor
        snapshot = cursor.snapshot
        if snapshot is not None and snapshot.events and cursor.reset_reason is None:
            return cursor.next_of_snapshot(snapshot)
        while True:
            batch = cursor.batch
            while batch and cursor.reset_reason is None:
                wanted = cursor.wants(batch[-1])
                entry = batch.pop()
                cursor.delivered = entry.offset
                if wanted:
                    cursor.delivered_events += 1
                    return entry.event
            with cursor.dispatcher.lock:
                cursor.check()
                if cursor.reset_reason is not None:
                    cursor.batch = []
                    return cursor.take_reset()
                cursor.ended = cursor.ended or cursor.at_end
                if not cursor.ended:
                    cursor.batch = cursor.read(_BATCH_EVENTS)[::-1]
                    cursor.ended = not cursor.batch and cursor.at_end  # a run may end without a final event
            if cursor.ended:
                self.close()
            if not cursor.batch:
                return None


class _Iterator:
    """Iterates over a subscription, and closes it when a loop is left with a ``break`` or an error."""

    __slots__ = ("_subscription",)

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    def __aiter__(self) -> AsyncIterator[ServerSentEvent]:
        return self

    def __anext__(self) -> Any:
        return self._subscription.__anext__()

    async def aclose(self) -> None:
        """Close the subscription."""
        await self._subscription.aclose()

    def __del__(self) -> None:
        self._subscription.close_soon()
