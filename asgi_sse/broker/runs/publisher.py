"""`RunPublisher`: publishes the events of a run's source until the source ends or is stopped."""

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

    from asgi_sse.runtime.base import Child, EventLoop

logger: Final = logging.getLogger(__name__)

Outcome: TypeAlias = Literal[
    "finished",
    "failed",  # the source raised
    "cancelled",
    "expired",  # max_lifetime is over
    "drained",  # the broker was closed
    "lost",  # the process died, or its lease expired
]

_CLEANUP_S: Final = 10.0
"""Seconds that a stopped source has for its clean-up; the default of a stream's `cleanup_timeout`."""

_LAST_EVENT_S: Final = 2.0
"""Seconds that the last event of a run waits for the backend when the broker is closed."""


class Destination(Protocol):
    """The run that the events of a source are published to."""

    name: str

    async def put(self, event: ServerSentEvent, end: Outcome | None = None) -> None:
        """Publish an event, and wait until the backend acknowledges it. `end` marks the last one."""
        ...

    def put_soon(self, event: ServerSentEvent, end: Outcome) -> None:
        """Publish the last event without waiting."""
        ...

    def give_up(self, outcome: Outcome) -> None:
        """Mark the run as ended, since its last event cannot be published."""
        ...


class RunPublisher:
    """Runs the source of one run and publishes its events.

    Args:
        source: The source.
        destination: The run.
        on_end: Makes the last event, from the outcome and the error.

    Attributes:
        loop: The event loop that the source runs in.
        error: What the source raised.
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
        self._stopped: Outcome | None = None  # the outcome that `stop` was given
        self._outcome: Outcome = "finished"  # the outcome without a `stop`
        self._ending = False
        self._clean_up_task: Child | None = None

    def start(self) -> None:
        """Start the source."""
        self._source_task.start(self, self._put, self.loop, "asgi_sse run")

    def stop(self, outcome: Outcome) -> None:
        """End the source early with `outcome`. Safe from any thread."""
        if not self.loop.call_threadsafe(partial(self._stop, outcome)) and not self._ending:
            self._ending = True
            self._end_now(outcome)  # the event loop was closed while the source ran

    def _stop(self, outcome: Outcome) -> None:
        if self._stopped is None and not self._ending:
            self._stopped = outcome
            self._source_task.stop()
            # Kept, since asyncio holds its tasks weakly.
            self._clean_up_task = self.loop.spawn(partial(self._clean_up, outcome), "asgi_sse run clean-up")

    async def _clean_up(self, outcome: Outcome) -> None:
        try:
            # If the event loop ends meanwhile, it cancels the source itself, which then publishes the final event.
            await self._source_task.clean_up(self, _CLEANUP_S, force_if_cancelled=False)
            if not self._ending and self._source_task.running:
                self._ending = True
                self._end_now(outcome)
        finally:
            self._clean_up_task = None  # a run that is kept must not keep its event loop

    def _put(self, item: Any) -> Awaitable[None]:
        return self._destination.put(event_to_publish(item))

    # The owner of its source task

    def describe(self) -> tuple[str, dict[str, object]]:
        """Return the run's name for log records, and their extra fields."""
        name = self._destination.name
        return f"run {name}", {"sse_run": name}

    def source_raised(self, error: BaseException) -> None:
        """Record the outcome of a source that raised, and log the error."""
        child = self._source_task.child
        cancelled = self._stopped is not None or (child is not None and child.cancelled)
        if cancelled and isinstance(error, anyio.get_cancelled_exc_class()):
            self._outcome = "cancelled"  # by us, or because the event loop ends
            return
        self._outcome = "failed"
        self.error = self.error or error
        name = self._destination.name
        logger.error("the source of run %s raised", name, exc_info=error, extra={"sse_run": name})

    def source_ended(self) -> Awaitable[None] | None:
        """Publish the last event, unless the source was abandoned before."""
        if self._ending:
            return None
        self._ending = True
        return self._publish_end(self._stopped or self._outcome)

    # The end of the run

    async def _publish_end(self, outcome: Outcome) -> None:
        if outcome == "lost":  # another process has published the end
            self._destination.give_up(outcome)
            return
        event = await self._make_final_event(outcome)
        try:
            with anyio.fail_after(_LAST_EVENT_S if self._stopped == "drained" else math.inf):
                await self._destination.put(event, outcome)
        except (BrokerError, TimeoutError) as exc:
            why = str(exc) or f"not acknowledged within {_LAST_EVENT_S:g} s"
            name = self._destination.name
            logger.error(  # noqa: TRY400
                "the end of run %s could not be published: %s", name, why, extra={"sse_run": name}
            )
            self._destination.give_up(outcome)

    def _end_now(self, outcome: Outcome) -> None:
        self._source_task.child = None  # not `release`: what waits for it may be in an event loop that is closed
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
                with anyio.fail_after(_CLEANUP_S):
                    made = await made
            return event_to_publish(made)
        except BaseException:
            name = self._destination.name
            logger.exception("on_end of run %s raised", name, extra={"sse_run": name})
            return final_event(outcome)


def final_event(outcome: Outcome) -> ServerSentEvent:
    """Make the event that ends a run."""
    return ServerSentEvent({"reason": outcome}, event="end")
