"""`Run`: a source that goes on when its clients leave, and a channel that ends when its source does."""

from __future__ import annotations

import logging
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import anyio
import anyio.lowlevel

from .._eventloop import Child, EventLoop, current_loop
from ..errors import InvalidEventError
from ..event import ServerSentEvent
from ..routing import HTTPError
from ..source import iterate
from .channel import Channel
from .hub import unnumbered

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable

    from ..routing import Request
    from .broker import Broker
    from .hub import Hub
    from .subscription import Subscription

logger = logging.getLogger(__name__)

Outcome: TypeAlias = Literal[
    "finished",
    "failed",  # its source raised
    "cancelled",
    "expired",  # its max_lifetime is over
    "drained",  # the broker was closed
]

_CLEANUP: Final = 10.0
"""Seconds that a source which was told to stop has for its clean-up; as a stream's by default."""

_LAST_CALL: Final = 0.1
"""Seconds that it has to obey its second cancellation, before it is left behind."""


class Run(Channel):
    """A source that is published to a channel, whoever reads it; and that channel, until some time after its end.

    A client that comes late gets it from its first event on, one that comes back from where it was. Behind the final
    event their streams end; who has that one already is answered 204, at which an EventSource stops. From an endpoint:
    ``return run``; and it is an ASGI app.

    Attributes:
        name: The channel's name.
        loop: The event loop that its source runs in.
        start: The number behind which its events are.
        final: The number of its last one, once there is one.
        outcome: ``finished``, ``failed``, ``cancelled``, ``expired`` or ``drained``; ``None``: it goes on.
        error: What its source raised.
    """

    __slots__ = (
        "__weakref__", "_child", "_ended", "_ending", "_interrupt", "_on_end", "_pace", "_pumping", "_source",
        "_stopped", "_subscription", "_waiters", "error", "final", "loop", "outcome", "start", "told_at",
    )  # fmt: skip

    def __init__(
        self,
        broker: Broker,
        hub: Hub,
        name: str,
        source: AsyncIterable[Any] | Iterable[Any],
        *,
        subscription: Callable[..., Subscription],
        pace: Callable[[], Awaitable[None]],
        on_end: Callable[[Outcome, BaseException | None], Any] | None,
        ended: Callable[[Run], None],
    ) -> None:
        super().__init__(broker, hub, name)
        self.start = 0
        self.final: int | None = None
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.told_at: float | None = None  # that its broker is to be closed
        self.loop: EventLoop = current_loop()
        self._source: AsyncIterator[Any] | None = iterate(source)
        self._subscription = subscription
        self._pace = pace
        self._on_end = on_end
        self._ended = ended
        self._child: Child | None = None
        self._interrupt: type[BaseException] = anyio.get_cancelled_exc_class()
        self._pumping = False
        self._stopped: Outcome | None = None  # why it was told to stop
        self._ending = False
        self._waiters: list[tuple[EventLoop, anyio.Event]] = []

    def begin(self) -> None:
        """Let the source run."""
        self._child = self.loop.spawn(self._pump, "asgi_sse run")

    def cancel(self) -> None:
        """End it early: its source sees one cancellation, and its clients get the final event. From any thread."""
        self.stop("cancelled")

    async def wait(self) -> Outcome:
        """Wait until it has ended, and give how."""
        while self.outcome is None:
            waiter = current_loop(), anyio.Event()
            with self._hub.lock:
                self._waiters.append(waiter)
            try:
                if self.outcome is None:  # else who ended it may not have seen us
                    await waiter[1].wait()
            finally:
                with self._hub.lock:
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
        with self._hub.lock:
            place = self._hub.log.parse(last_event_id or "")
            return self.final is not None and isinstance(place, int) and place >= self.final

    async def answer(self, request: Request) -> Subscription:
        """See `Channel.answer`.

        Raises:
            HTTPError: 204, the client has all of it.
        """
        if self.was_seen_by(request.last_event_id):
            raise HTTPError(204)
        return self.subscribe(last_event_id=request.last_event_id, info=request)

    def stop(self, outcome: Outcome) -> None:
        """End it early, and say so. From any thread."""
        if not self.loop.call_threadsafe(partial(self._stop, outcome)) and not self._ending:
            self._ending = True
            self._end(outcome, _final_event(outcome))  # its event loop was closed under it

    def _stop(self, outcome: Outcome) -> None:
        if self._stopped is None and not self._ending:
            self._stopped = outcome
            if self._child is not None and self._pumping:  # else its first step finds that it is to close the source
                self._child.cancel()
            self.loop.call_at(self.loop.time() + _CLEANUP, self._insist)

    def _insist(self) -> None:
        if not self._ending and self._child is not None:
            logger.warning("the source of run %s was not cleaned up within %g s: %r", self.name, _CLEANUP, self._source)
            self._child.cancel_again()
            self.loop.call_at(self.loop.time() + _LAST_CALL, self._leave_behind)

    def _leave_behind(self) -> None:
        if not self._ending and self._stopped is not None:
            self._ending = True
            self._end(self._stopped, _final_event(self._stopped))

    # The source's task

    async def _pump(self) -> None:
        outcome: Outcome = "finished"
        self._pumping = True
        try:
            if self._stopped is None:
                await self._publish()
        except GeneratorExit:
            raise  # collected with its event loop
        except BaseException as exc:
            outcome = self._raised(exc)
        if self._child is not None:
            self._child.spare()
        try:
            close = getattr(self._source, "aclose", None)
            if close is not None:
                await close()
        except BaseException as exc:
            outcome = self._raised(exc)
        self._source = None
        if not self._ending:  # else it came out of its clean-up after all
            self._ending = True
            outcome = self._stopped or outcome
            self._end(outcome, await self._make_final_event(outcome))

    async def _publish(self) -> None:
        source: Any = self._source
        throw = getattr(source, "athrow", None)
        step: Awaitable[Any] = source.__anext__()
        while True:
            try:
                item = await step
            except StopAsyncIteration:
                return
            if self._stopped is not None:
                return  # it swallowed its cancellation, and yielded
            try:
                self._hub.publish(self.name, unnumbered(item))
                await self._pace()
            except (InvalidEventError, self._interrupt) as exc:  # at its yield, so that the traceback names the line
                if throw is None:
                    raise
                if isinstance(exc, InvalidEventError):
                    await anyio.lowlevel.checkpoint()  # or a source that catches each would starve the loop
                step = throw(exc)
            else:
                step = source.__anext__()

    def _raised(self, exc: BaseException) -> Outcome:
        told = self._stopped is not None or (self._child is not None and self._child.cancelled)
        if isinstance(exc, self._interrupt) and told:
            return "cancelled"  # by us, or because the event loop ends
        self.error = self.error or exc
        logger.error("the source of run %s raised", self.name, exc_info=exc)
        return "failed"

    # The end

    async def _make_final_event(self, outcome: Outcome) -> ServerSentEvent:
        if self._on_end is None:
            return _final_event(outcome)
        try:
            made = self._on_end(outcome, self.error)
            if isawaitable(made):
                with anyio.fail_after(_CLEANUP):
                    made = await made
            return unnumbered(made)
        except BaseException:
            logger.exception("on_end of run %s raised", self.name)
            return _final_event(outcome)

    def _end(self, outcome: Outcome, event: ServerSentEvent) -> None:
        self._hub.publish(self.name, event, ends=self)
        self.outcome = outcome
        self._child = None
        with self._hub.lock:
            waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            loop.call_threadsafe(waiter.set)
        self._ended(self)


def _final_event(outcome: Outcome) -> ServerSentEvent:
    return ServerSentEvent({"reason": outcome}, event="end")
