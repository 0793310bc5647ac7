"""`RunPublisher`: publishes what the source of a run gives, whoever reads, until it ends or is told to."""

from __future__ import annotations

import logging
import math
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

import anyio

from asgi_sse.broker.publishing import event_to_publish
from asgi_sse.errors import BrokerError
from asgi_sse.protocol.event import ServerSentEvent
from asgi_sse.runtime.current import current_loop
from asgi_sse.stream.source_task import SourceTask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from asgi_sse.runtime.base import EventLoop

logger = logging.getLogger(__name__)

Outcome: TypeAlias = Literal[
    "finished",
    "failed",  # its source raised
    "cancelled",
    "expired",  # its max_lifetime is over
    "drained",  # the broker was closed
    "lost",  # its process was, or was not heard of for too long
]

_CLEANUP: Final = 10.0
"""Seconds that a source which was told to stop has for its clean-up; as a stream's by default."""

_LAST_CALL: Final = 0.1
"""Seconds that it has to obey its second cancellation, before it is left behind."""

_LAST_WORD: Final = 2.0
"""Seconds for which the last event of a run waits for its engine when the broker is closed."""


class Destination(Protocol):
    """Where what a source gives goes to."""

    name: str

    async def put(self, event: ServerSentEvent, end: Outcome | None = None) -> None:
        """Publish an event, the last one of a run that ended so; as long as that takes."""
        ...

    def put_soon(self, event: ServerSentEvent, end: Outcome) -> None:
        """Publish the last event, without waiting for it."""
        ...

    def give_up(self, outcome: Outcome) -> None:
        """It has ended, and nobody can be told by an event."""
        ...


class RunPublisher:
    """A source that is published.

    Args:
        source: The source.
        destination: Where its events go.
        on_end: Makes the last event.

    Attributes:
        loop: The event loop that the source runs in.
        error: What it raised.
    """

    def __init__(
        self,
        source: AsyncIterator[Any],
        destination: Destination,
        on_end: Callable[[Outcome, BaseException | None], Any] | None,
    ) -> None:
        self.loop: EventLoop = current_loop()
        self.error: BaseException | None = None
        self._source_task = SourceTask(source)
        self._destination = destination
        self._on_end = on_end
        self._stopped: Outcome | None = None  # why it was told to stop
        self._outcome: Outcome = "finished"  # where it was not
        self._ending = False

    def begin(self) -> None:
        """Let the source run."""
        self._source_task.start(self, self.loop, "asgi_sse run")

    def stop(self, outcome: Outcome) -> None:
        """End it early, and say so. From any thread."""
        if not self.loop.call_threadsafe(partial(self._stop, outcome)) and not self._ending:
            self._ending = True
            self._end_now(outcome)  # its event loop was closed under it

    def _stop(self, outcome: Outcome) -> None:
        if self._stopped is None and not self._ending:
            self._stopped = outcome
            self._source_task.stop()
            self.loop.call_at(self.loop.time() + _CLEANUP, self._insist)

    def _insist(self) -> None:
        child = self._source_task.child
        if not self._ending and child is not None:
            name = self._destination.name
            logger.warning(
                "the source of run %s was not cleaned up within %g s: %r", name, _CLEANUP, self._source_task.source,
                extra={"sse_run": name},
            )  # fmt: skip
            child.force_cancel()
            self.loop.call_at(self.loop.time() + _LAST_CALL, self._leave_behind)

    def _leave_behind(self) -> None:
        if not self._ending and self._stopped is not None:
            self._ending = True
            self._end_now(self._stopped)

    # As the owner of its source_task

    def taker(self) -> Callable[[Any], Awaitable[None]]:
        """See `source_task.Owner`."""
        return lambda item: self._destination.put(event_to_publish(item))

    def source_raised(self, error: BaseException) -> None:
        """See `source_task.Owner`."""
        child = self._source_task.child
        told = self._stopped is not None or (child is not None and child.cancelled)
        if told and isinstance(error, anyio.get_cancelled_exc_class()):
            self._outcome = "cancelled"  # by us, or because the event loop ends
            return
        self._outcome = "failed"
        self.error = self.error or error
        name = self._destination.name
        logger.error("the source of run %s raised", name, exc_info=error, extra={"sse_run": name})

    def source_ended(self) -> Awaitable[None] | None:
        """See `source_task.Owner`."""
        if self._ending:
            return None  # it came out of its clean-up after all
        self._ending = True
        return self._end(self._stopped or self._outcome)

    # The end

    async def _end(self, outcome: Outcome) -> None:
        if outcome == "lost":  # another process has said so
            self._destination.give_up(outcome)
            return
        event = await self._make_final_event(outcome)
        try:
            with anyio.fail_after(_LAST_WORD if self._stopped == "drained" else math.inf):
                await self._destination.put(event, outcome)
        except (BrokerError, TimeoutError) as exc:
            why = str(exc) or f"not acknowledged within {_LAST_WORD:g} s"
            name = self._destination.name
            logger.error(  # noqa: TRY400
                "the end of run %s could not be published: %s", name, why, extra={"sse_run": name}
            )
            self._destination.give_up(outcome)

    def _end_now(self, outcome: Outcome) -> None:
        self._source_task.child = None
        if outcome == "lost":
            self._destination.give_up(outcome)
        else:
            self._destination.put_soon(final_event(outcome), outcome)

    async def _make_final_event(self, outcome: Outcome) -> ServerSentEvent:
        if self._on_end is None:
            return final_event(outcome)
        try:
            made = self._on_end(outcome, self.error)
            if isawaitable(made):
                with anyio.fail_after(_CLEANUP):
                    made = await made
            return event_to_publish(made)
        except BaseException:
            name = self._destination.name
            logger.exception("on_end of run %s raised", name, extra={"sse_run": name})
            return final_event(outcome)


def final_event(outcome: Outcome) -> ServerSentEvent:
    """What stands behind the last event of a run."""
    return ServerSentEvent({"reason": outcome}, event="end")
