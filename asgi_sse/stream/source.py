"""`iterate` makes an async iterator of any source. A sync source runs in a thread of its own."""

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

logger: Final = logging.getLogger(__name__)

MAX_THREADS: Final = 256
"""The most sync sources that run at once in this process. Each holds a thread until its stream ends."""

_BATCH: Final = 64
"""Items, or KiB, that a thread may run ahead of its stream; as much as one send carries."""


def check_content(content: Any) -> None:
    """Raise if `content` is not a source, before a client waits for it.

    Raises:
        TypeError: `content` cannot be iterated, or would be iterated in an unintended way.
    """
    if inspect.iscoroutine(content):
        name = content.__qualname__
        content.close()  # otherwise Python warns that it was never awaited
        raise TypeError(
            f"content must be a series of events, got a coroutine of {name}(); await it and pass what it returns, or "
            f"make {name} an async generator by yielding its events"
        )
    if inspect.isasyncgenfunction(content) or inspect.isgeneratorfunction(content):
        name = content.__qualname__
        raise TypeError(f"content must be a series of events, got the function {name}; call it: {name}(...)")
    if isinstance(content, str | bytes | bytearray | memoryview | Mapping):
        raise TypeError(
            f"content must be a series of events, got a single {type(content).__name__}: {short_repr(content)}; "
            "put it in a list"
        )
    if not isinstance(content, AsyncIterable | Iterable):
        hint = "pass an async generator, any async iterable, or an iterable"
        if hasattr(content, "subscribe"):
            hint = "pass its subscribe(last_event_id=...), or return it from an endpoint as it is"
        if content is None:
            hint = "raise HTTPError(204) if there is nothing to say"
        if isinstance(content, Exception):
            hint = f"raise the {type(content).__name__} instead of returning it"
        raise TypeError(f"content must be iterable, got {short_repr(content)}; {hint}")


def iterate(content: AsyncIterable[Any] | Iterable[Any]) -> AsyncIterator[Any]:
    """Iterate over the items of `content`. The iterator has an ``aclose`` if there is something to close."""
    if isinstance(content, AsyncIterable):
        return content.__aiter__()
    # A list has all its items already, so no thread has to wait for them. A subclass may compute its items.
    return _items_of(content) if type(content) in (list, tuple) else ThreadedIterator(content)


async def _items_of(content: Iterable[Any]) -> AsyncGenerator[Any]:
    for item in content:
        yield item


_NEXT_TIMEOUT_S: Final = 0.1
"""Seconds that a stream waits at its end for a thread that is inside ``next()``."""


class ThreadedIterator:
    """Iterates over a sync iterable in one daemon thread and one context, from the first item to the last.

    Threads of a pool would break sqlite's cursors and context variables, which belong to one thread. A blocked one
    would hold up the interpreter's exit.

    Args:
        iterable: The source.
        ahead: Whether the thread may run ahead of the stream.
    """

    def __init__(self, iterable: Iterable[Any], *, ahead: bool = True) -> None:
        self._iterable = iterable
        self._ahead = ahead
        self._loop: EventLoop | None = None
        self._changed = threading.Condition()  # guards the following attributes
        self._items: deque[Any] = deque()
        self._wanted: anyio.Event | None = None  # the thread sets it through the loop
        self._error: BaseException | None = None
        self._ended = False
        self._closing = False
        self._in_next = False
        self._unheard = False  # whether the stream ended without waiting for the thread
        self._kib = 0  # KiB handed over since the last batch was taken

    def __aiter__(self) -> "ThreadedIterator":
        return self

    async def __anext__(self) -> Any:
        """Return the next item, or raise the error of the iterable.

        Raises:
            SSEError: Too many sync sources run already.
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
        """Close the iterable in its thread. A thread that is inside ``next()`` is waited for only briefly."""
        with self._changed:
            self._closing = True
            self._changed.notify()
            if self._loop is None:  # never started
                close = getattr(self._iterable, "close", None)
                if close is not None:
                    close()
                return
            if self._ended:
                self._raise_error()
                return
            wait_s = _NEXT_TIMEOUT_S if self._in_next else math.inf
            wanted = self._wanted = anyio.Event()
        with anyio.move_on_after(wait_s):
            await wanted.wait()
        with self._changed:
            cleaning_up = not (self._in_next or self._ended)  # it has left next(), with an item that is not needed
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
                del error  # its traceback holds this frame, and this frame would hold the error

    def _start(self) -> None:
        if not _threads.acquire(blocking=False):
            raise SSEError(
                f"sync sources must be at most {MAX_THREADS} at a time in a process; make this one an async generator, "
                "which needs no thread"
            )
        self._loop = current_loop()
        context = contextvars.copy_context()
        try:
            threading.Thread(target=context.run, args=(self._run,), name="asgi_sse source", daemon=True).start()
        except RuntimeError as exc:
            self._loop = None
            _threads.release()
            raise SSEError(
                f"the process cannot start another thread ({exc}); make the source an async generator"
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
        except BaseException as exc:  # the stream raises it
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
            while not (
                self._ahead or self._wanted or self._closing
            ):  # the stream asks for an item when the one before is sent
                self._changed.wait()
            if self._kib >= _BATCH:
                while self._items and not self._closing:  # a batch at a time, since switching threads is expensive
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
            logger.error("a sync source raised after its stream had ended", exc_info=error)

    def _wake(self) -> None:
        if self._wanted is not None and self._loop is not None:
            self._loop.call_threadsafe(self._wanted.set)
            self._wanted = None


def _length(item: Any) -> int:
    data = item.get("data") if isinstance(item, dict) else getattr(item, "data", item)
    return len(data) if isinstance(data, str | bytes | bytearray) else 0


_threads: Final = threading.BoundedSemaphore(MAX_THREADS)
