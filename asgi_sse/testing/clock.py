"""Virtual time: a test of keep-alives or of an hour's timeout takes milliseconds.

Not for tests with sockets, threads or subprocesses. While those work, the event loop has nothing to do, so its clock
jumps to the next timeout. A synchronous source runs in a thread, so it needs real time as well.
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
    """A selector that moves the clock to the next timer instead of sleeping until then."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:  # no timer is set: only another thread or a socket can wake the loop
            return super().select(None)
        self.now += timeout
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop in which an hour's timeout takes no time.

    Pass it to ``asyncio.Runner(loop_factory=VirtualTimeLoop)`` or to anyio's ``backend_options``. On trio, use
    ``trio.testing.MockClock(autojump_threshold=0)``.
    """

    def __init__(self) -> None:
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Return the virtual time in seconds. It starts at 0."""
        return self._virtual.now


@overload
def virtual_time(test: Callable[_P, Awaitable[_T]], /) -> Callable[_P, _T]: ...


@overload
def virtual_time(*, backend: str = ...) -> Callable[[Callable[_P, Awaitable[_T]]], Callable[_P, _T]]: ...


def virtual_time(test: Callable[..., Awaitable[Any]] | None = None, /, *, backend: str = "asyncio") -> Any:
    """Turn an async test into a synchronous one that runs in its own event loop with virtual time.

    So the test needs no pytest plugin and works beside any. Its fixtures must be synchronous.

    Args:
        test: The test, a coroutine function. Leave it out to pass `backend`.
        backend: ``"asyncio"`` or ``"trio"``. Default: ``"asyncio"``.

    Returns:
        The synchronous test, or a decorator if you left out `test`.

    Raises:
        TypeError: `test` is not a coroutine function.
        ValueError: `backend` is unknown.
    """
    if backend not in ("asyncio", "trio"):
        raise ValueError(f"backend must be 'asyncio' or 'trio', got {backend!r}")
    if test is None:
        return partial(_make_synchronous, backend=backend)
    return _make_synchronous(test, backend=backend)


def _make_synchronous(test: Callable[..., Awaitable[Any]], *, backend: str) -> Callable[..., Any]:
    if not iscoroutinefunction(test):
        raise TypeError(
            f"test must be a coroutine function, got {short_repr(test)}; write virtual_time right above an async def"
        )

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        options: dict[str, Any] = {"loop_factory": VirtualTimeLoop}
        if backend == "trio":
            from trio.testing import MockClock  # noqa: PLC0415 (trio is optional)

            options = {"clock": MockClock(autojump_threshold=0)}
        return anyio.run(partial(test, *args, **kwargs), backend=backend, backend_options=options)

    run.asgi_sse_virtual_time = (test, backend)  # type: ignore[attr-defined]  # for `unwrap_virtual_time`
    return run


def unwrap_virtual_time(test: Any) -> tuple[Callable[..., Awaitable[Any]], str] | None:
    """Return the coroutine function and the backend that `virtual_time` was given, or ``None`` for another test."""
    found: tuple[Callable[..., Awaitable[Any]], str] | None = getattr(test, "asgi_sse_virtual_time", None)
    if found is None or not hasattr(test, "__self__"):
        return found
    return partial(found[0], test.__self__), found[1]  # a method


@contextmanager
def real_deadline(seconds: float, expired: Callable[[], object] | None = None) -> Iterator[anyio.CancelScope]:
    """Cancel the block after `seconds` of real time, whatever the clock of the event loop says.

    A timeout of the event loop does not do: on a virtual clock it would expire before a thread has started.

    Args:
        seconds: The real time that the block may take.
        expired: A function to call in the event loop before the block is cancelled.
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
