"""Time that passes at once: a test of keep-alives or of an hour's timeout takes milliseconds.

Not for sockets, threads and subprocesses: while they work the loop has nothing to do, and jumps to the next
timeout. So a synchronous source is not for it either.
"""

import asyncio
import selectors
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar, overload

import anyio

from asgi_sse.errors import short_repr
from asgi_sse.runtime.current import current_loop

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of sleeping until a timer is due, moves the clock to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:  # nothing will ever happen but what comes from outside
            return super().select(None)
        self.now += timeout
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop of asyncio in which an hour's timeout takes no time.

    For ``asyncio.Runner(loop_factory=VirtualTimeLoop)`` and the ``backend_options`` of anyio. trio has
    ``trio.testing.MockClock(autojump_threshold=0)``.
    """

    def __init__(self) -> None:
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """The virtual time in seconds, from 0."""
        return self._virtual.now


@overload
def virtual_time(test: Callable[_P, Awaitable[_T]], /) -> Callable[_P, _T]: ...


@overload
def virtual_time(*, backend: str = ...) -> Callable[[Callable[_P, Awaitable[_T]]], Callable[_P, _T]]: ...


def virtual_time(test: Callable[..., Awaitable[Any]] | None = None, /, *, backend: str = "asyncio") -> Any:
    """Make of an async test a synchronous one, which runs in an event loop of its own with virtual time.

    So it needs no plugin of pytest, and works beside any; its fixtures are synchronous ones.

    Args:
        test: The test: a coroutine function. Left out, what is given is the decorator.
        backend: ``"asyncio"`` or ``"trio"``.

    Raises:
        TypeError: `test` is no coroutine function.
        ValueError: `backend` is none.
    """
    if backend not in ("asyncio", "trio"):
        raise ValueError(f"backend={backend!r} is none; give 'asyncio' or 'trio'")
    if test is None:
        return partial(_synchronous, backend=backend)
    return _synchronous(test, backend=backend)


def _synchronous(test: Callable[..., Awaitable[Any]], *, backend: str) -> Callable[..., Any]:
    if not iscoroutinefunction(test):
        raise TypeError(f"{short_repr(test)} is no coroutine function; write virtual_time right above an async def")

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        options: dict[str, Any] = {"loop_factory": VirtualTimeLoop}
        if backend == "trio":
            from trio.testing import MockClock  # noqa: PLC0415 (trio is optional)

            options = {"clock": MockClock(autojump_threshold=0)}
        return anyio.run(partial(test, *args, **kwargs), backend=backend, backend_options=options)

    run.in_virtual_time = (test, backend)  # type: ignore[attr-defined]
    return run


def inside_of(test: Any) -> tuple[Callable[..., Awaitable[Any]], str] | None:
    """The coroutine function, and the backend, of a test that `virtual_time` has made synchronous."""
    found: tuple[Callable[..., Awaitable[Any]], str] | None = getattr(test, "in_virtual_time", None)
    if found is None or not hasattr(test, "__self__"):
        return found
    return partial(found[0], test.__self__), found[1]  # a method


@contextmanager
def real_deadline(seconds: float, expired: Callable[[], object] | None = None) -> Iterator[anyio.CancelScope]:
    """Cancel the block when so many seconds have really passed, whatever the clock of the event loop says.

    For what has to end: on a virtual clock, a timeout of the loop's own would be over before a thread has begun.
    `expired` is called first, in the event loop.
    """
    loop, scope = current_loop(), anyio.CancelScope()

    def expire() -> None:
        if expired is not None:
            expired()
        scope.cancel()

    timer = threading.Timer(seconds, loop.call_threadsafe, [expire])
    timer.daemon = True
    timer.start()
    try:
        with scope:
            yield scope
    finally:
        timer.cancel()
