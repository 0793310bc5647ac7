"""`DeadlineQueue`, which wakes streams and runs when they have something due."""

import heapq
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any, Final, Protocol

from .base import EventLoop
from .current import LoopLocal

logger: Final = logging.getLogger(__name__)

_MIN_VOID_ENTRIES: Final = 64
"""The queue looks for void entries to remove only when it has more than this many."""


class Deadlined(Protocol):
    """An object that a `DeadlineQueue` wakes.

    Attributes:
        check_at: The loop's time at which the queue wakes the object; ``inf`` while it is not armed.
            The queue sets it. Start with ``inf``.
        deadline_entry: The queue's entry for the object. The queue sets it. Start with an empty list.
    """

    check_at: float
    deadline_entry: list[Any]

    @property
    def log_fields(self) -> Mapping[str, object]:
        """The ``extra`` of the log record if `tick` raises."""
        ...

    def tick(self) -> float:
        """Do what is due; return the loop's time at which to be woken again, ``inf`` for never."""
        ...


class DeadlineQueue:
    """Wakes many objects of one event loop, each when it asked to be woken.

    One timer serves all objects. It is set for the earliest time that any of them asked for. A timer that
    was set for a later time fires too, and may find nothing to do.

    An object has one valid entry. An entry that became void stays in the heap until its time comes,
    because a busy stream moves its next keep-alive with every send.

    Args:
        loop: The event loop. Call every method in it.
    """

    __slots__ = ("_entries", "_loop", "_sequence", "_timers", "_void")

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._entries: list[tuple[float, int, list[Deadlined]]] = []
        self._void = 0
        self._sequence = count()
        self._timers: list[float] = []  # when each timer that is set fires

    def arm(self, item: Deadlined, when: float) -> None:
        """Wake `item` at `when`, in the loop's time, unless `item` is already due to be woken sooner."""
        if when < item.check_at:
            self.forget(item)
            item.check_at = when
            item.deadline_entry = [item]
            heapq.heappush(self._entries, (when, next(self._sequence), item.deadline_entry))
            self._set_timer()

    def forget(self, item: Deadlined) -> None:
        """Do not wake `item` any more. Its entry stays in the heap, empty."""
        if item.deadline_entry:
            item.deadline_entry.clear()
            self._void += 1
            if self._void > _MIN_VOID_ENTRIES and self._void > len(self._entries) // 2:
                self._entries = [entry for entry in self._entries if entry[2]]
                heapq.heapify(self._entries)
                self._void = 0
        item.check_at = math.inf

    def call_later(self, seconds: float, callback: Callable[[], None], **log_fields: object) -> None:
        """Call `callback` once, `seconds` from now.

        Unlike a timer of the loop, this costs no task on trio and no timer of its own.

        Args:
            seconds: The delay.
            callback: The function. An exception that it raises is logged.
            **log_fields: The ``extra`` of that log record.
        """
        self.arm(_Call(callback, log_fields), self._loop.time() + seconds)

    def _set_timer(self) -> None:
        if self._entries and self._entries[0][0] < min(self._timers, default=math.inf):
            when = self._entries[0][0]
            self._timers.append(when)
            self._loop.call_at(when, partial(self._wake_due, when))

    def _wake_due(self, when: float) -> None:
        self._timers.remove(when)
        now = max(when, self._loop.time())  # asyncio may call early by the resolution of its clock
        due = []
        while self._entries and self._entries[0][0] <= now:
            entry = heapq.heappop(self._entries)[2]
            self._void -= not entry
            due += entry
        for item in due:
            item.deadline_entry = []
            item.check_at = math.inf
            try:
                self.arm(item, item.tick())
            except Exception:
                logger.exception(
                    "%r raised at its deadline and will not be woken again", item, extra=dict(item.log_fields)
                )
        self._set_timer()


class _Call:
    """A callback that a `DeadlineQueue` calls once."""

    __slots__ = ("_callback", "check_at", "deadline_entry", "log_fields")

    def __init__(self, callback: Callable[[], None], log_fields: Mapping[str, object]) -> None:
        self._callback = callback
        self.log_fields = log_fields
        self.check_at = math.inf
        self.deadline_entry: list[Any] = []

    def tick(self) -> float:
        self._callback()
        return math.inf

    def __repr__(self) -> str:
        return f"<call of {self._callback!r}>"


_queues: Final = LoopLocal(DeadlineQueue)


def current_deadlines() -> DeadlineQueue:
    """Return the deadline queue of the event loop that the caller runs in."""
    return _queues.get()
