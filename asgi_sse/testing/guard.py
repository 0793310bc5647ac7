"""What the plugin of pytest does around one test: it bounds it in real time, and finds the streams that it leaves."""

import _weakrefset
import asyncio
import signal
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import wraps
from inspect import iscoroutinefunction
from types import FrameType
from typing import Any, Final

import anyio

from asgi_sse.protocol.validation import check_number
from asgi_sse.stream.observer import Observer, process_observers
from asgi_sse.stream.stream import Stream

from .clock import inside_of, real_deadline, virtual_time
from .stream import PATIENCE, OpenStream, open_streams

_GRACE: Final = 1.0
"""Seconds that streams have to end after the test, whose clients have just left."""

_AGAIN: Final = 5.0
"""Seconds after which a test is interrupted again, if the first one was lost, as in an ``except`` of its own."""

_TURN: Final = 1.0
"""Seconds that an event loop has for the turn in which it is interrupted. One that takes longer is blocked."""

_STEP: Final = 0.01

_POSTPONED: Final = 200
"""Steps for which an interruption waits for the end of a destructor, which may hang as well."""

_OF_WEAK_REFERENCES: Final = frozenset({weakref.__file__, _weakrefset.__file__})

_HINT: Final = (
    "If it waits for a response: httpx's ASGITransport and Starlette's TestClient give none until the app has "
    "returned; use open_stream() or StreamingASGITransport of asgi_sse.testing"
)


class _Expired(KeyboardInterrupt):
    """The test takes too long. Out of a callback, asyncio lets these alone pass."""


class _Begun(Observer):
    """Notes each stream that begins."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def begun(self, stream: Stream) -> None:
        """See `Observer`."""
        self.streams.append(stream)


class Guard:
    """Around one test. An async one is cancelled, so that its clean-up runs; any other is interrupted by SIGALRM.

    Args:
        timeout: Seconds of real time; ``None``: any time.
        leaks: Whether a stream that is left running is a failure.

    Attributes:
        failure: What is wrong, if anything is.

    Raises:
        TypeError: `timeout` is no number.
        ValueError: It is not more than 0.
    """

    def __init__(self, timeout: float | None = 10.0, *, leaks: bool = True) -> None:
        check_number("timeout", timeout, optional=True, positive=True)
        self.failure = ""
        self._timeout = timeout
        self._leaks = leaks
        self._around = False
        self._has_deadline = False  # which its event loop knows of
        self._alarm: Any = None
        self._in_loop = False  # its event loop is to end it
        self._patient = False  # with its clean-up
        self._postponed = 0
        self._interrupted = False
        self._over = False
        self._begun = _Begun()
        self._before: set[OpenStream] = set()
        self._stop_observing: Callable[[], None] | None = None

    @staticmethod
    def takes(test: Any) -> bool:
        """Whether `around` can be put around it: a test of hypothesis is called many times by another function."""
        return (iscoroutinefunction(test) or inside_of(test) is not None) and not hasattr(test, "hypothesis")

    def around(self, test: Callable[..., Any]) -> Callable[..., Any]:
        """The test with its timeout, and the look at what it leaves, in its own event loop."""
        self._around = True
        virtual = inside_of(test)
        if virtual is None:
            return self._guarded(test)
        inner, backend = virtual
        return virtual_time(backend=backend)(self._guarded(inner))

    def _guarded(self, test: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[None]]:
        bounded = self._bounded(test)

        @wraps(test)
        async def guarded(*args: Any, **kwargs: Any) -> None:
            await bounded(*args, **kwargs)
            with anyio.move_on_after(_GRACE):
                while self._left():  # noqa: ASYNC110 (nobody tells of an end in another thread)
                    await anyio.sleep(_STEP)
            self._check()

        return guarded

    def _bounded(self, test: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[None]]:
        self._has_deadline = self._timeout is not None

        @wraps(test)
        async def bounded(*args: Any, **kwargs: Any) -> None:
            try:
                if self._timeout is None:
                    await test(*args, **kwargs)
                else:
                    with real_deadline(self._timeout, self._expired):
                        await test(*args, **kwargs)
            except* _Expired:  # out of its task, it would end the event loop, which other tests may run in too
                pass

        return bounded

    def in_unittest(self, test: Callable[..., Any], fail: Callable[[str], object]) -> Callable[..., Any]:
        """The test with its timeout, which calls `fail`: behind a KeyboardInterrupt, unittest does not clean up."""
        if iscoroutinefunction(test):
            bounded = self._bounded(test)

            @wraps(test)
            async def fails_async() -> None:
                await bounded()
                if self.failure:
                    fail(self.failure)

            return fails_async

        @wraps(test)
        def fails() -> None:
            with suppress(_Expired):
                test()
            if self.failure:
                fail(self.failure)

        return fails

    def __enter__(self) -> None:
        self._before = set(open_streams)
        self._stop_observing = process_observers.add(self._begun)
        self._set_alarm()

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._over = True  # also for what a loop, which more tests run in, has not called yet
        if self._alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._alarm)
        if self._stop_observing is not None:
            self._stop_observing()
        if kind is None and not self._around:
            ends = time.monotonic() + _GRACE
            while self._left() and time.monotonic() < ends:
                time.sleep(_STEP)
            self._check()
        self._begun.streams.clear()

    def _set_alarm(self) -> None:
        # Signals reach the main thread alone; and another plugin may have set its own.
        if self._timeout is None or threading.current_thread() is not threading.main_thread():
            return
        if not hasattr(signal, "setitimer") or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
            return
        self._alarm = signal.signal(signal.SIGALRM, self._interrupt)
        signal.setitimer(signal.ITIMER_REAL, self._timeout, _AGAIN)

    def _interrupt(self, _: int, frame: FrameType | None) -> None:
        seconds = self._time_left(frame)
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
        else:
            self._raise()

    def _time_left(self, frame: FrameType | None) -> float:
        """Seconds for which something better may end it than an interruption of whatever it does."""
        if not self._in_loop and (self._has_deadline or self._soon_in_loop()):
            self._in_loop = True
            return _TURN
        if self._has_deadline and self.failure and not (self._interrupted or self._patient):
            self._patient = True
            return 2 * PATIENCE  # it was cancelled; what does not take its deadline for a turn is blocked
        if self._postponed < _POSTPONED and _is_lost_in(frame):
            self._postponed += 1
            return _STEP
        return 0

    def _raise(self) -> None:
        if not self._over:
            self._tell()
            raise _Expired(self.failure)

    def _soon_in_loop(self) -> bool:
        """Interrupt the event loop that runs in this thread between two of its steps; whether there is one.

        Elsewhere may be the middle of what it cannot leave half done: a coroutine that no task has taken yet would
        never be awaited.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            # Behind what a task that has ended in this turn has to say: that the loop is to stop, for one.
            loop.call_soon_threadsafe(loop.call_soon, self._raise_in_loop)
            return True
        if (trio := sys.modules.get("trio")) is None:
            return False
        try:
            trio.lowlevel.current_trio_token().run_sync_soon(self._cancel, trio.lowlevel.current_root_task)
        except RuntimeError:
            return False
        return True

    def _raise_in_loop(self) -> None:
        if not self._interrupted:  # else it was blocked, and cleans up now
            self._raise()

    def _cancel(self, root: Callable[[], Any]) -> None:
        # What is raised out of a callback is an internal error to trio. The innermost nursery of the root task has only
        # one task, which trio.run() has been given.
        if not (self._over or self._interrupted):
            self._tell()
            root().child_nurseries[-1].cancel_scope.cancel()

    def _tell(self) -> None:
        self._interrupted = True
        self._expired()
        signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)  # what it cleans up now may take as long

    def _expired(self) -> None:
        lines = [f"the test has not ended within {self._timeout:g} s", *self._open(), _HINT]
        self.failure = self.failure or ".\n".join(lines)

    def _left(self) -> bool:
        return self._leaks and not self.failure and bool(self._open())

    def _check(self) -> None:
        if self._left():
            lines = ["the test leaves streams behind", *self._open()]
            self.failure = ".\n".join([*lines, "Leave the block of open_stream(), or end what runs the app"])

    def _open(self) -> list[str]:
        """What is open that was not before the test, a line each."""
        lines = [
            f"  {stream!r}, a source that was not cleaned up within its cleanup_timeout"
            if stream.abandoned
            else f"  {stream!r}, {stream.events} events"
            for stream in self._begun.streams
            if stream.state != "closed" or stream.abandoned
        ]
        return lines + [f"  {stream!r}" for stream in open_streams if stream not in self._before]


def _is_lost_in(frame: FrameType | None) -> bool:
    """Whether what is raised there goes no further: out of a destructor, or what follows in `weakref`."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename in _OF_WEAK_REFERENCES:
            return True
        frame = frame.f_back
    return False
