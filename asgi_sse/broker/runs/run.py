"""`Run`: a source that outlives its clients, and the channel that its events are published to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import anyio

from asgi_sse.broker.backends.base import Backend, Publication
from asgi_sse.broker.channel import Channel
from asgi_sse.errors import BrokerError, short_repr
from asgi_sse.routing.request import HTTPError
from asgi_sse.runtime.current import current_loop

from .publisher import Outcome, RunPublisher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_sse.broker.backends.base import RunLease
    from asgi_sse.broker.channel import ChannelSource
    from asgi_sse.broker.dispatcher import Dispatcher
    from asgi_sse.broker.ring import Entry
    from asgi_sse.broker.subscription import Subscription
    from asgi_sse.protocol.event import ServerSentEvent
    from asgi_sse.routing.request import Request
    from asgi_sse.runtime.base import EventLoop

__all__ = ["Outcome", "Run"]


class Run(Channel):
    """A source whose events are published to a channel, with or without subscribers; made by `Broker.run`.

    A run outlives its clients. A client that comes late gets it from the first event on, and a client that reconnects
    continues where it was. Streams end after the final event. A client that has the final event already is answered
    with 204, at which an EventSource stops. After its end, a run can be read for its ``ttl``.

    An endpoint can return a run, and a run is an ASGI app. Its source may run in another process.

    Attributes:
        name: The name of the channel.
        loop: The event loop that the source runs in. For a run of another process: the loop in which it was found.
        start: The offset after which the events of the run begin.
        final: The offset of the last event; ``None`` while the run is running.
        outcome: ``finished``, ``failed``, ``cancelled``, ``expired``, ``drained`` or ``lost``; ``None`` while the run
            is running.
    """

    __slots__ = (
        "__weakref__",
        "_backend",
        "_broker_closed",
        "_give_up",
        "_pace",
        "_subscribe",
        "_waiters",
        "acknowledged_end",
        "closing_since",
        "final",
        "lease",
        "loop",
        "outcome",
        "publisher",
        "start",
    )  # fmt: skip

    def __init__(
        self,
        broker: ChannelSource,
        dispatcher: Dispatcher,
        name: str,
        lease: RunLease,
        *,
        backend: Backend,
        subscribe: Callable[..., Subscription],
        pace: Callable[[], Awaitable[None]],
        give_up: Callable[[Run, Outcome], None],
    ) -> None:
        super().__init__(broker, dispatcher, name)
        self.lease: RunLease = lease
        self.start: int = lease.start
        self.final: int | None = None
        self.outcome: Outcome | None = None
        self.closing_since: float | None = None  # when `Broker.begin_close` was called, by `clock`
        self.loop: EventLoop = current_loop()
        self.publisher: RunPublisher | None = None  # only in the process in which the source runs
        self.acknowledged_end: tuple[ServerSentEvent, Outcome] | None = None  # the last event, once it is acknowledged
        self._give_up = give_up
        self._backend = backend
        self._subscribe = subscribe
        self._pace = pace
        self._broker_closed = False
        self._waiters: list[tuple[EventLoop, anyio.Event]] = []

    @property
    def whole(self) -> bool:
        """Whether the log has the run from its first event on. If not, the run began in an earlier epoch."""
        return self.lease.whole

    @property
    def error(self) -> BaseException | None:
        """The exception that the source raised in this process; ``None`` if there is none."""
        return None if self.publisher is None else self.publisher.error

    def cancel(self) -> None:
        """End the run early. May be called from any thread.

        The source sees one cancellation, and the clients get the final event. If the source runs in another process,
        that process is asked to cancel it.
        """
        self.stop("cancelled")

    def stop(self, outcome: Outcome) -> None:
        """End the run early with `outcome`. May be called from any thread."""
        if self.publisher is not None:
            self.publisher.stop(outcome)
        else:
            self._backend.request_cancel(self.name, self.lease.holder)

    async def wait(self) -> Outcome:
        """Wait until the run has ended and return its outcome. May be called in any event loop.

        Raises:
            BrokerError: The broker was closed, while the run is running in another process.
        """
        while self.outcome is None:
            if self._broker_closed:
                raise BrokerError(f"the broker was closed; run {self.name} may be running in another process")
            waiter = current_loop(), anyio.Event()
            with self._dispatcher.lock:
                self._waiters.append(waiter)
            try:
                if self.outcome is None and not self._broker_closed:  # it may have ended before the waiter was added
                    await waiter[1].wait()
            finally:
                with self._dispatcher.lock:
                    if waiter in self._waiters:
                        self._waiters.remove(waiter)
        return self.outcome

    def subscribe(
        self,
        *,
        last_event_id: str | None = None,
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002 (named after that of `Broker.subscribe`)
        checkpoint: bool = False,
        snapshot: Callable[[], Any] | None = None,
        info: Any = None,
    ) -> Subscription:
        """Return a subscription that begins after an id, or with the first event, and ends with the run.

        Args:
            last_event_id: The id of the last event that was read. ``None`` or ``""``: begin with the first event.
            filter: Returns whether an event is to be read. The final event is always read.
            checkpoint: As for `Broker.subscribe`.
            snapshot: Must be ``None``.
            info: Any object, for `on_join` and `on_leave` of the broker.

        Raises:
            TypeError: There is a snapshot, which a run has no use for.
        """
        if snapshot is not None:
            raise TypeError(
                f"snapshot must be None, got {short_repr(snapshot)}; run {self.name} is read from its first event on"
            )
        return self._subscribe(
            (self.name,),
            last_event_id=last_event_id,
            filter=filter,
            checkpoint=checkpoint,
            snapshot=None,
            info=info,
            run=self,
        )

    def was_seen_by(self, last_event_id: str | None) -> bool:
        """Return whether a client with this id has all events of the run."""
        with self._dispatcher.lock:
            offset = self._dispatcher.log.parse(last_event_id or "")
            return self.final is not None and isinstance(offset, int) and offset >= self.final

    async def answer(self, request: Request) -> Subscription:
        """Return what to answer a request with.

        Raises:
            HTTPError: 204, because the client has all events of the run.
        """
        if self.was_seen_by(request.last_event_id):
            raise HTTPError(204)
        return self.subscribe(last_event_id=request.last_event_id, info=request)

    # Called by the publisher

    async def put(self, event: ServerSentEvent, end: Outcome | None = None) -> None:
        """Publish an event, and wait for the acknowledgement without a time limit."""
        await self._backend.publish(self._publication(event, end), wait=True)
        if end is not None:
            self.acknowledged_end = event, end
        await self._pace()

    def put_soon(self, event: ServerSentEvent, end: Outcome) -> None:
        """Publish the last event without waiting."""
        self._backend.post(self._publication(event, end))

    def give_up(self, outcome: Outcome) -> None:
        """End the run without an event."""
        self._give_up(self, outcome)

    def _publication(self, event: ServerSentEvent, end: Outcome | None) -> Publication:
        ring = self._dispatcher.log.ring(self.name)
        return Publication(
            self.name,
            event,
            end=end,
            keep_after=self.start if ring is None else max(self.start, ring.trimmed),
            ttl=None if end is None else self.lease.ttl,
        )

    # Called by the manager

    def broker_closed(self) -> None:
        """Wake the callers of `wait`: this process will not see the end of a run of another process."""
        with self._dispatcher.lock:
            if self.outcome is None:
                self._broker_closed = True
                self._wake_waiters()

    def set_ended(self, final: int, outcome: str) -> None:
        """Note the end of the run. Called from any thread, with the dispatcher's lock held."""
        self.final, self.outcome = final, cast("Outcome", outcome)
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            loop.call_threadsafe(waiter.set)

    def is_ended_by(self, entry: Entry) -> bool:
        """Return whether an event is the last one of this run, and not of an earlier run of the same name."""
        return entry.end is not None and self.outcome is None and entry.offset > self.start
