"""What asyncio and trio do differently, behind one face: time, callbacks, the source's task, the sends.

Everything else of this package is written once, for both.
"""

import sys

from anyio.lowlevel import RunVar

from .base import Child, EventLoop, Sender, Wait

__all__ = ["Child", "EventLoop", "Sender", "Wait", "current_loop"]

_current: RunVar[EventLoop] = RunVar("asgi_sse event loop")


def current_loop() -> EventLoop:
    """The face of the event loop that the caller runs in.

    Raises:
        RuntimeError: There is none.
    """
    try:
        return _current.get()
    except LookupError:
        loop: EventLoop
        if _in_trio_task():
            from .on_trio import TrioLoop  # noqa: PLC0415 (trio is optional)

            loop = TrioLoop()
        else:
            from .on_asyncio import AsyncioLoop  # noqa: PLC0415 (as the other)

            loop = AsyncioLoop()
        _current.set(loop)
        return loop


def _in_trio_task() -> bool:
    # Asked of trio, not of asyncio: in trio's guest mode an asyncio loop runs as well.
    trio = sys.modules.get("trio")
    if trio is None:
        return False
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True
