"""`Observer`: hooks that are called as streams begin and end, for metrics, traces and dashboards."""

import logging
import threading
from collections.abc import Callable
from typing import Final, Literal

from asgi_sse.errors import printable

from .stream import Stream

logger: Final = logging.getLogger(__name__)


class Observer:
    """Hooks of a stream. Override the ones that you need; exceptions are logged.

    The hooks run in the context of the stream's request. If the stream was adopted, they run in a task of the stream,
    with a copy of that context.
    """

    def begun(self, stream: Stream) -> None:
        """Called in the request's task, before the source runs."""

    def ending(self, stream: Stream) -> None:
        """Called before the last message is sent. ``stream.reason`` says why the stream ends.

        Called in the context of the request, but not in its task. The server, and each middleware around the app,
        treat the request as finished after that message. A body that stays cut has no last message.
        """

    def ended(self, stream: Stream) -> None:
        """Called in the request's task, when the source is cleaned up or abandoned.

        If the event loop was closed under the stream, the hook is called when that is noticed, and the stream has an
        ``age`` of 0 seconds.
        """


class ObserverList:
    """The observers of one registry, or of all registries of the process."""

    __slots__ = ("_lock", "observers")

    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()  # replaced, never changed, since other threads iterate over it
        self._lock = threading.Lock()  # held while the tuple is replaced

    def add(self, observer: Observer) -> Callable[[], None]:
        """Add `observer` and return a function that removes it."""
        with self._lock:
            self.observers = (*self.observers, observer)
        removed = False

        def remove() -> None:
            nonlocal removed
            with self._lock:
                if not removed:  # a second call must not remove another registration of the same observer
                    removed = True
                    remaining = list(self.observers)
                    remaining.remove(observer)
                    self.observers = tuple(remaining)

        return remove

    def call(self, hook: Literal["begun", "ending", "ended"], stream: Stream) -> None:
        """Call `hook` of the observers of the process, then of the observers of this list."""
        for observer in (*process_observers.observers, *self.observers):
            try:
                getattr(observer, hook)(stream)
            except Exception:
                logger.exception(
                    "observer %r raised in %s of %r", observer, hook, stream, extra={"sse_path": printable(stream.path)}
                )


class EndedCallback(Observer):
    """Calls a function with each stream that has ended.

    Args:
        function: Called with the stream.
    """

    def __init__(self, function: Callable[[Stream], object]) -> None:
        self._function = function

    def __repr__(self) -> str:
        return repr(self._function)

    def ended(self, stream: Stream) -> None:
        """Call the function."""
        self._function(stream)


process_observers: Final = ObserverList()
"""The observers of every registry of this process."""
