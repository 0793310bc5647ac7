"""What asyncio and trio do differently, behind one face: time, callbacks, the source's task, the sends.

Everything else of this package is written once, for both.
"""

import asyncio
import sys
import weakref
from typing import Any

from anyio.lowlevel import RunVar

from .base import EventLoop

# Every request asks, so a look into a dictionary where that is enough: anyio's RunVar takes five times as long.
_on_asyncio: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, EventLoop]" = weakref.WeakKeyDictionary()
_on_trio: RunVar[EventLoop] = RunVar("asgi_sse event loop")


def current_loop() -> EventLoop:
    """The face of the event loop that the caller runs in.

    Raises:
        RuntimeError: There is none.
    """
    trio = sys.modules.get("trio")
    if trio is not None and _in_trio_task(trio):
        return _trio_loop()
    running = asyncio.get_running_loop()
    loop = _on_asyncio.get(running)
    if loop is None:
        from .asyncio_loop import AsyncioLoop  # noqa: PLC0415 (each where it is used)

        loop = _on_asyncio[running] = AsyncioLoop()
    return loop


def running_loop() -> EventLoop | None:
    """As `current_loop`; ``None`` where there is none."""
    try:
        return current_loop()
    except RuntimeError:
        return None


def _trio_loop() -> EventLoop:
    try:
        return _on_trio.get()
    except LookupError:
        from .trio_loop import TrioLoop  # noqa: PLC0415 (trio is optional)

        loop = TrioLoop()
        _on_trio.set(loop)
        return loop


def _in_trio_task(trio: Any) -> bool:
    # Asked of trio, not of asyncio: in trio's guest mode an asyncio loop runs as well.
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True
