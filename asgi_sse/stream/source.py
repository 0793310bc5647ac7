"""Makes one async iterator of what a response is given, and runs synchronous ones in a thread of their own."""

import contextvars
import inspect
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import anyio

from asgi_sse.errors import SSEError, short_repr
from asgi_sse.runtime.current import current_loop

if TYPE_CHECKING:
    from asgi_sse.runtime.base import EventLoop

logger = logging.getLogger(__name__)

MAX_THREADS: Final = 256
"""Synchronous sources that may run at once in this process: each holds a thread until its stream ends."""

_BATCH: Final = 64
"""Items, or KiB, that a thread may be ahead of its stream: as much as one send carries."""


def check_content(content: Any) -> None:
    """Refuse what is no source, before any client waits for it.

    Raises:
        TypeError: `content` cannot be iterated, or not as meant.
    """
    if inspect.iscoroutine(content):
        name = content.__qualname__
        content.close()  # or Python would warn that it was never awaited
        raise TypeError(
            f"content is a coroutine of {name}(): await it and give what it returns, or make {name} an async "
            "generator by yielding its events"
        )
    if inspect.isasyncgenfunction(content) or inspect.isgeneratorfunction(content):
        raise TypeError(f"content is the function {content.__qualname__} itself; call it: {content.__qualname__}(...)")
    if isinstance(content, str | bytes | bytearray | memoryview | Mapping):
        raise TypeError(
            f"content={short_repr(content)} is a single {type(content).__name__}, not a series of events; put it in a list"
        )
    if not isinstance(content, AsyncIterable | Iterable):
        hint = "give an async generator, any async iterable, or an iterable"
        if hasattr(content, "subscribe"):
            hint = "give its subscribe(last_event_id=...), or return it from an endpoint as it is"
        if content is None:
            hint = "raise HTTPError(204) if there is nothing to say"
        if isinstance(content, Exception):
            hint = f"raise the {type(content).__name__}, in place of returning it"
        raise TypeError(f"content={short_repr(content)} is not iterable; {hint}")


def iterate(content: AsyncIterable[Any] | Iterable[Any]) -> AsyncIterator[Any]:
    """The items of `content`, one by one. Has an ``aclose`` wherever there is something to close."""
    if isinstance(content, AsyncIterable):
        return content.__aiter__()
    # A list has all its items, so that no thread is needed to wait for them; a subclass may make them.
    return _items_of(content) if type(content) in (list, tuple) else ThreadedIterator(content)


async def _items_of(content: Iterable[Any]) -> AsyncGenerator[Any]:
    for item in content:
        yield item


_IN_NEXT: Final = 0.1
"""Seconds that a thread inside ``next()`` has to come out of it, before its stream ends without it."""


class ThreadedIterator:
    """Iterates over a synchronous iterable in one daemon thread and one context, from first to last item.

    A pooled thread would break sqlite's cursors and context variables, which belong to one thread, and
    one that is blocked would hold the interpreter's exit.

    Args:
        iterable: The source.
        ahead: Whether the thread may be ahead of who asks for its items.
    """

    def __init__(self, iterable: Iterable[Any], *, ahead: bool = True) -> None:
        self._iterable = iterable
        self._ahead = ahead
        self._loop: EventLoop | None = None
        self._changed = threading.Condition()  # guards all that follows
        self._items: deque[Any] = deque()
        self._wanted: anyio.Event | None = None  # set from the thread, through the loop
        self._error: BaseException | None = None
        self._ended = False
        self._closing = False
        self._in_next = False
        self._unheard = False  # the stream has ended without waiting for the thread
        self._kib = 0  # handed over since the last batch was taken

    def __aiter__(self) -> "ThreadedIterator":
        return self

    async def __anext__(self) -> Any:
        """The next item, or what the iterable raised.

        Raises:
            SSEError: Too many synchronous sources run already.
        """
        if self._loop is None:
            self._start()
        while True:
            with self._changed:
                if self._items:
                    item = self._items.popleft()
                    if not self._items:
                        self._changed.notify()
                    return item
                if self._ended:
                    self._raise_error()
                    raise StopAsyncIteration
                wanted = self._wanted = anyio.Event()
                if not self._ahead:
                    self._changed.notify()
            await wanted.wait()

    async def aclose(self) -> None:
        """Close the iterable in its thread. Does not wait long for a thread that is inside ``next()``."""
        with self._changed:
            self._closing = True
            self._changed.notify()
            if self._loop is None:  # never begun
                close = getattr(self._iterable, "close", None)
                if close is not None:
                    close()
                return
            if self._ended:
                self._raise_error()
                return
            patience = _IN_NEXT if self._in_next else math.inf
            wanted = self._wanted = anyio.Event()
        with anyio.move_on_after(patience):
            await wanted.wait()
        with self._changed:
            cleaning_up = not (self._in_next or self._ended)  # it has come out, with an item that nobody wants
            if cleaning_up:
                wanted = self._wanted = anyio.Event()
        if cleaning_up:
            await wanted.wait()
        with self._changed:
            self._unheard = not self._ended
            self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or its traceback would hold this frame, and this frame it

    def _start(self) -> None:
        if not _threads.acquire(blocking=False):
            raise SSEError(
                f"{MAX_THREADS} synchronous sources run already, the most there may be: make this one an async "
                "generator, which needs no thread"
            )
        self._loop = current_loop()
        context = contextvars.copy_context()
        try:
            threading.Thread(target=context.run, args=(self._run,), name="asgi_sse source", daemon=True).start()
        except RuntimeError as exc:
            self._loop = None
            _threads.release()
            raise SSEError(
                f"this process can start no more threads ({exc}): make the source an async generator"
            ) from exc

    def _run(self) -> None:
        iterator: Any = None
        error: BaseException | None = None
        try:
            self._in_next = True
            iterator = iter(self._iterable)
            while self._enter_next():
                self._hand_over(next(iterator))
        except StopIteration:
            pass
        except BaseException as exc:  # for the stream to raise
            error = exc
        try:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        except BaseException as exc:
            error = error or exc
        finally:
            _threads.release()
            self._end(error)

    def _enter_next(self) -> bool:
        with self._changed:
            while not (self._ahead or self._wanted or self._closing):  # who asks for an item has sent the one before
                self._changed.wait()
            if self._kib >= _BATCH:
                while self._items and not self._closing:  # a batch at a time: a switch of threads is dear
                    self._changed.wait()
                self._kib = 0
            self._in_next = not self._closing
            return self._in_next

    def _hand_over(self, item: Any) -> None:
        with self._changed:
            self._in_next = False
            self._items.append(item)
            self._kib += 1 + _length(item) // 1024
            self._wake()

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            self._in_next = False
            self._ended = True
            self._error = error
            self._wake()
        if error is not None and self._unheard:
            logger.error("a synchronous source raised after its stream had ended", exc_info=error)

    def _wake(self) -> None:
        if self._wanted is not None and self._loop is not None:
            self._loop.call_threadsafe(self._wanted.set)
            self._wanted = None


def _length(item: Any) -> int:
    data = item.get("data") if isinstance(item, dict) else getattr(item, "data", item)
    return len(data) if isinstance(data, str | bytes | bytearray) else 0


_threads: Final = threading.BoundedSemaphore(MAX_THREADS)
