"""`Observer`: sees streams come and go, for who counts, traces or shows them."""

import logging
import threading
from collections.abc import Callable
from typing import Final, Literal

from asgi_sse.errors import printable

from .stream import Stream

logger = logging.getLogger(__name__)


class Observer:
    """Is told of streams. What it does not care for, it leaves as it is; what it raises is logged.

    Of a stream that an app sends by itself, the task is one of its own, with a copy of its request's context.
    """

    def begun(self, stream: Stream) -> None:
        """In the task and the context of its request, before its source runs."""

    def ending(self, stream: Stream) -> None:
        """Its last message is about to be sent, and ``reason`` says why.

        In the context of its request, but not in its task. Behind that message a server takes the request to be over,
        and so do middlewares around the app. A body that stays cut has no such message.
        """

    def ended(self, stream: Stream) -> None:
        """It has ended, and its source is cleaned up or left behind. In the task and the context of its request.

        One whose event loop was closed under it ends where that is found out, and has lasted 0 seconds.
        """


class Observers:
    """Those of one registry, or of all."""

    __slots__ = ("_lock", "all")

    def __init__(self) -> None:
        self.all: tuple[Observer, ...] = ()  # replaced, and never changed: other threads look at it
        self._lock = threading.Lock()  # for who replaces it

    def add(self, observer: Observer) -> Callable[[], None]:
        """Tell `observer` from now on; until what is given is called."""
        with self._lock:
            self.all = (*self.all, observer)
        removed = False

        def remove() -> None:
            nonlocal removed
            with self._lock:
                if not removed:  # once: it may have been added again
                    removed = True
                    known = list(self.all)
                    known.remove(observer)
                    self.all = tuple(known)

        return remove

    def tell(self, what: Literal["begun", "ending", "ended"], stream: Stream) -> None:
        """Call that method of each, here and `EVERYWHERE`."""
        for observer in (*EVERYWHERE.all, *self.all):
            try:
                getattr(observer, what)(stream)
            except Exception:
                logger.exception("%r raised, of %r", observer, stream, extra={"sse_path": printable(stream.path)})


class Told(Observer):
    """Calls a function with each stream that has ended."""

    def __init__(self, function: Callable[[Stream], object]) -> None:
        self._function = function

    def __repr__(self) -> str:
        return repr(self._function)

    def ended(self, stream: Stream) -> None:
        """See `Observer`."""
        self._function(stream)


EVERYWHERE: Final = Observers()
"""Those of all registries of this process."""
