"""`Run`: a source that goes on when its clients leave, and a channel that ends when its source does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import anyio

from asgi_sse.broker.backends.base import Backend, Publication
from asgi_sse.broker.channel import Channel
from asgi_sse.errors import BrokerError
from asgi_sse.routing.request import HTTPError
from asgi_sse.runtime.current import current_loop

from .publisher import Outcome, RunPublisher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_sse.broker.backends.base import RunLease
    from asgi_sse.broker.broker import Broker
    from asgi_sse.broker.dispatcher import Dispatcher
    from asgi_sse.broker.ring import Entry
    from asgi_sse.broker.subscription import Subscription
    from asgi_sse.protocol.event import ServerSentEvent
    from asgi_sse.routing.request import Request
    from asgi_sse.runtime.base import EventLoop

__all__ = ["Outcome", "Run"]


class Run(Channel):
    """A source that is published to a channel, whoever reads it; and that channel, until some time after its end.

    A client that comes late gets it from its first event on, one that comes back from where it was. Behind the final
    event their streams end; who has that one already is answered 204, at which an EventSource stops. From an endpoint:
    ``return run``; and it is an ASGI app. Its source may run in another process.

    Attributes:
        name: The channel's name.
        loop: The event loop that its source runs in; of another process's, that in which it was found.
        start: The number behind which its events are.
        final: The number of its last one, once there is one.
        outcome: ``finished``, ``failed``, ``cancelled``, ``expired``, ``drained`` or ``lost``; ``None``: it goes on.
    """

    __slots__ = (
        "__weakref__",
        "_backend",
        "_left",
        "_pace",
        "_subscription",
        "_waiters",
        "final",
        "given_up",
        "last_word",
        "lease",
        "loop",
        "outcome",
        "publisher",
        "start",
        "told_at",
    )  # fmt: skip

    def __init__(
        self,
        broker: Broker,
        dispatcher: Dispatcher,
        name: str,
        lease: RunLease,
        *,
        backend: Backend,
        subscription: Callable[..., Subscription],
        pace: Callable[[], Awaitable[None]],
        given_up: Callable[[Run, Outcome], None],
    ) -> None:
        super().__init__(broker, dispatcher, name)
        self.lease = lease
        self.start = lease.start
        self.final: int | None = None
        self.outcome: Outcome | None = None
        self.told_at: float | None = None  # that its broker is to be closed
        self.loop: EventLoop = current_loop()
        self.publisher: RunPublisher | None = None  # of a run of this process
        self.last_word: tuple[ServerSentEvent, Outcome] | None = None  # once it is acknowledged
        self.given_up = given_up
        self._backend = backend
        self._subscription = subscription
        self._pace = pace
        self._left = False
        self._waiters: list[tuple[EventLoop, anyio.Event]] = []

    @property
    def error(self) -> BaseException | None:
        """What its source raised in this process."""
        return None if self.publisher is None else self.publisher.error

    def cancel(self) -> None:
        """End it early: its source sees one cancellation, and its clients get the final event. From any thread.

        Of one that runs in another process, it is asked for.
        """
        self.stop("cancelled")

    def stop(self, outcome: Outcome) -> None:
        """End it early, and say so. From any thread."""
        if self.publisher is not None:
            self.publisher.stop(outcome)
        else:
            self._backend.request_cancel(self.name, self.lease.holder)

    async def wait(self) -> Outcome:
        """Wait until it has ended, and give how.

        Raises:
            BrokerError: The broker was closed, and it goes on in another process.
        """
        while self.outcome is None:
            if self._left:
                raise BrokerError(f"the broker was closed; run {self.name} may go on in another process")
            waiter = current_loop(), anyio.Event()
            with self._dispatcher.lock:
                self._waiters.append(waiter)
            try:
                if self.outcome is None and not self._left:  # else who ended it may not have seen us
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
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002 (as of Broker.subscribe)
        checkpoint: bool = False,
        snapshot: Callable[[], Any] | None = None,
        info: Any = None,
    ) -> Subscription:
        """A place in it: behind an id, or at its first event, so that there is no use for a snapshot.

        Raises:
            TypeError: There is a snapshot.
        """
        if snapshot is not None:
            raise TypeError(f"run {self.name} is read from its first event on: leave the snapshot out")
        return self._subscription(
            (self.name,),
            last_event_id=last_event_id,
            filter=filter,
            checkpoint=checkpoint,
            snapshot=None,
            info=info,
            run=self,
        )

    def was_seen_by(self, last_event_id: str | None) -> bool:
        """Whether a client that has this id has all of it."""
        with self._dispatcher.lock:
            place = self._dispatcher.log.parse(last_event_id or "")
            return self.final is not None and isinstance(place, int) and place >= self.final

    async def answer(self, request: Request) -> Subscription:
        """See `Channel.answer`.

        Raises:
            HTTPError: 204, the client has all of it.
        """
        if self.was_seen_by(request.last_event_id):
            raise HTTPError(204)
        return self.subscribe(last_event_id=request.last_event_id, info=request)

    # For its publisher

    async def put(self, event: ServerSentEvent, end: Outcome | None = None) -> None:
        """See `publisher.Destination`."""
        await self._backend.publish(self._publication(event, end), wait=True)
        if end is not None:
            self.last_word = event, end
        await self._pace()

    def put_soon(self, event: ServerSentEvent, end: Outcome) -> None:
        """See `publisher.Destination`."""
        self._backend.post(self._publication(event, end))

    def give_up(self, outcome: Outcome) -> None:
        """See `publisher.Destination`."""
        self.given_up(self, outcome)

    def _publication(self, event: ServerSentEvent, end: Outcome | None) -> Publication:
        ring = self._dispatcher.log.ring(self.name)
        return Publication(
            self.name,
            event,
            end=end,
            keep_after=self.start if ring is None else max(self.start, ring.trimmed),
            ttl=None if end is None else self.lease.ttl,
        )

    def leave(self) -> None:
        """The broker is closed: nobody will tell how it ends."""
        with self._dispatcher.lock:
            if self.outcome is None:
                self._left = True
                self._tell()

    def ended(self, final: int, outcome: str) -> None:
        """Its last event is there. With the dispatcher's lock held, from any thread."""
        self.final, self.outcome = final, cast("Outcome", outcome)
        self._tell()

    def _tell(self) -> None:
        waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            loop.call_threadsafe(waiter.set)

    def is_ended_by(self, entry: Entry) -> bool:
        """Whether an event is the last one of this run, and not of one that was called so before."""
        return entry.end is not None and self.outcome is None and entry.offset > self.start
