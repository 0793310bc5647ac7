"""`Snapshot`: the state that a reader is given before the events that change it."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, Iterable, Mapping
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final

from asgi_sse.errors import InvalidEventError, short_repr
from asgi_sse.protocol.event import ServerSentEvent, as_event, event_with_id

if TYPE_CHECKING:
    from collections.abc import Callable


_PATIENCE: Final = 5
"""Snapshots in a row behind which the log has forgotten what follows, before their reader is given up."""


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

    __slots__ = ("_asked", "_in_vain", "_make", "_making", "events", "position", "wanted")

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._making = False
        self._asked = 0  # times
        self._in_vain = 0  # times in a row
        self.wanted = False
        self.position = 0
        self.events: deque[ServerSentEvent] = deque()

    @property
    def is_too_slow(self) -> bool:
        """Whether the log has forgotten what came behind it each of the last times."""
        return self._in_vain >= _PATIENCE

    def want(self, position: int) -> None:
        """It is to be made anew."""
        self.wanted = True
        self.position = position
        self._asked += 1
        self._in_vain += 1
        self.events.clear()

    def was_followed(self) -> None:
        """An event behind it was read."""
        self._in_vain = 0

    async def make(self, id_of: Callable[[int], str]) -> None:
        """Make it, unless that is under way.

        Raises:
            InvalidEventError: An event of it cannot be sent, or has an id of its own.
            TypeError: What was made is no event and has none.
            Exception: What making it raised.
        """
        if self._making:
            return
        self._making = True
        try:
            while self.wanted:
                place, asked = id_of(self.position), self._asked  # as of now: what is read comes after
                events = await _collect(self._make())
                if asked != self._asked:
                    continue  # it was reset meanwhile
                if events:
                    events[-1] = event_with_id(events[-1], place)
                else:
                    events = [ServerSentEvent(id=place)]
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
        raise TypeError(f"snapshot gave {short_repr(made)}: give an event, an iterable of events, or None")
    events = [as_event(item) for item in items]
    for event in events:
        if event.id is not None:
            raise InvalidEventError(f"id={short_repr(event.id)} in a snapshot: its last event gets the id of its place")
    return events
