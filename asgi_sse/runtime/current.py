"""The event loop that the caller runs in, and values that exist once for each event loop.

asyncio and trio differ in time, callbacks, tasks and cancellation. `base.EventLoop` hides the
differences, so the rest of the package is written once.
"""

import asyncio
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from .base import EventLoop

T = TypeVar("T")

# Every request asks for its loop. A dictionary look-up takes a fifth of the time that anyio's RunVar takes.
_asyncio_loops: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, EventLoop]" = weakref.WeakKeyDictionary()


def current_loop() -> EventLoop:
    """Return the event loop that the caller runs in.

    Raises:
        RuntimeError: No event loop runs in this thread.
    """
    trio = sys.modules.get("trio")
    if trio is not None and _in_trio_task(trio):
        from .trio_loop import current_trio_loop  # noqa: PLC0415 (trio is optional)

        return current_trio_loop()
    running = asyncio.get_running_loop()
    loop = _asyncio_loops.get(running)
    if loop is None:
        from .asyncio_loop import AsyncioLoop  # noqa: PLC0415 (an app on trio does not need it)

        loop = _asyncio_loops[running] = AsyncioLoop()
    return loop


def running_loop() -> EventLoop | None:
    """Return the event loop that the caller runs in, or ``None`` if no event loop runs in this thread."""
    try:
        return current_loop()
    except RuntimeError:
        return None


def _in_trio_task(trio: Any) -> bool:
    # Ask trio, not asyncio: in trio's guest mode an asyncio loop runs in the same thread.
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True


class LoopLocal(Generic[T]):
    """A value that each event loop has once, made when a caller first asks for it.

    The value lives as long as its event loop.

    Args:
        make: Makes the value for an event loop.
    """

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[EventLoop], T]) -> None:
        self._make: Final = make

    def get(self) -> T:
        """Return the value of the event loop that the caller runs in.

        Raises:
            RuntimeError: No event loop runs in this thread.
        """
        return self.of(current_loop())

    def of(self, loop: EventLoop) -> T:
        """Return the value of `loop`. Call this in that loop only."""
        values: dict[LoopLocal[Any], Any] = loop.locals
        try:
            value: T = values[self]
        except KeyError:
            value = values[self] = self._make(loop)
        return value
