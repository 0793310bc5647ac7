"""`Snapshot`: the state that a reader is given before the events that change it."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, Iterable, Mapping
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from ..errors import InvalidEventError, shown
from ..event import ServerSentEvent, as_event, numbered_event

if TYPE_CHECKING:
    from collections.abc import Callable


class Snapshot:
    """Made for one reader, when it comes without a place to resume from, and after each reset.

    Args:
        make: Gives an event, events in any iterable, sync or async, or an awaitable of them.

    Attributes:
        wanted: It is to be made.
        position: Behind which the reader goes on. Taken before it is made, so that a change which it may or may not
            have seen comes after it in any case.
        events: What of it is not given yet. The last one has the id of the position, and no other one has any: a
            client that is cut in between gets all of it again.
    """

    __slots__ = ("_make", "events", "position", "wanted")

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self.wanted = False
        self.position = 0
        self.events: deque[ServerSentEvent] = deque()

    def want(self, position: int) -> None:
        """It is to be made anew."""
        self.wanted = True
        self.position = position
        self.events.clear()

    async def make(self, id_of: Callable[[int], str]) -> None:
        """Make it.

        Raises:
            InvalidEventError: An event of it cannot be sent, or has an id of its own.
            TypeError: What was made is no event and has none.
            Exception: What making it raised.
        """
        events = await _collect(self._make())
        place = id_of(self.position)
        if events:
            events[-1] = numbered_event(events[-1], place)
        else:
            events = [ServerSentEvent(id=place)]
        self.events.extend(events)
        self.wanted = False


async def _collect(made: Any) -> list[ServerSentEvent]:
    if isawaitable(made):
        made = await made
    if made is None:
        return []
    if isinstance(made, ServerSentEvent | Mapping | str | int | float):
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
        raise TypeError(f"snapshot gave {shown(made)}: give an event, an iterable of events, or None")
    events = [as_event(item) for item in items]
    for event in events:
        if event.id is not None:
            raise InvalidEventError(f"id={shown(event.id)} in a snapshot: its last event gets the id of its place")
    return events
