"""`Snapshot`: the state that a subscriber gets before the events that change it."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, Iterable, Mapping
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final

from asgi_sse.errors import InvalidEventError, short_repr
from asgi_sse.protocol.event import ServerSentEvent, as_event, event_with_id

if TYPE_CHECKING:
    from collections.abc import Callable


_MAX_OUTDATED: Final = 5
"""Snapshots in a row after which the log had dropped events before they were read, until the subscriber is closed."""


class Snapshot:
    """The state for one subscriber: made when it comes without an id to resume from, and after each reset.

    Args:
        make: Returns an event, an iterable of events, sync or async, or an awaitable of either.

    Attributes:
        wanted: Whether the snapshot is to be made.
        position: The offset after which the subscriber continues. It is taken before the snapshot is made, so that
            every change which the snapshot may have missed comes after it.
        events: The events of the snapshot that were not delivered yet. Only the last one has an id, which is that of
            the position. A client that disconnects before it therefore gets the whole snapshot again.
    """

    __slots__ = ("_make", "_making", "_outdated", "_requests", "events", "position", "wanted")

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._making = False
        self._requests = 0  # the number of calls of `request`
        self._outdated = 0  # the number of calls since an event after the snapshot was read
        self.wanted: bool = False
        self.position: int = 0
        self.events: deque[ServerSentEvent] = deque()

    @property
    def is_too_slow(self) -> bool:
        """Whether the log had dropped the next events each of the last times that the snapshot was made."""
        return self._outdated >= _MAX_OUTDATED

    def request(self, position: int) -> None:
        """Make a new snapshot, after which the subscriber continues at `position`."""
        self.wanted = True
        self.position = position
        self._requests += 1
        self._outdated += 1
        self.events.clear()

    def followed(self) -> None:
        """Note that an event after the snapshot was read."""
        self._outdated = 0

    async def make(self, id_of: Callable[[int], str]) -> None:
        """Make the snapshot if it is wanted and not being made.

        Args:
            id_of: Returns the id of an offset.

        Raises:
            InvalidEventError: An event of the snapshot cannot be sent, or has an id.
            TypeError: The function returned neither events nor ``None``.
            Exception: The function raised it.
        """
        if self._making:
            return
        self._making = True
        try:
            while self.wanted:
                # The id comes from the log as it is now, before the snapshot is made.
                event_id, requests = id_of(self.position), self._requests
                events = await _collect(self._make())
                if requests != self._requests:
                    continue  # the subscriber was reset meanwhile
                if events:
                    events[-1] = event_with_id(events[-1], event_id)
                else:
                    events = [ServerSentEvent(id=event_id)]
                self.events.extend(events)
                self.wanted = False
        finally:
            self._making = False


async def _collect(made: Any) -> list[ServerSentEvent]:
    if isawaitable(made):
        made = await made
    if made is None:
        return []
    if isinstance(made, ServerSentEvent | Mapping | str | int | float | bytes | bytearray | memoryview):
        items = [made]
    elif isinstance(made, AsyncIterable):
        iterator: Any = made.__aiter__()
        try:
            items = [item async for item in iterator]
        finally:
            if hasattr(iterator, "aclose"):
                await iterator.aclose()
    elif isinstance(made, Iterable):
        items = list(made)
    else:
        raise TypeError(f"snapshot must return an event, an iterable of events or None, got {short_repr(made)}")
    events = [as_event(item) for item in items]
    for event in events:
        if event.id is not None:
            raise InvalidEventError(
                f"an event of a snapshot must have no id, got id={short_repr(event.id)}; the broker adds the id"
            )
    return events
