"""`Interrupter`: ends a test that takes too long, so that its clean-up runs and the tests after it are not affected."""

import _weakrefset
import asyncio
import signal
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable
from functools import wraps
from types import FrameType
from typing import Any, Final

from .app_task import DEFAULT_TIMEOUT_S
from .clock import real_deadline

_RETRY_INTERVAL_S: Final = 5.0
"""Seconds after which a test is interrupted again, in case it caught the first interruption."""

_LOOP_TURN_S: Final = 1.0
"""Seconds that an event loop has for the turn in which it ends the test. One that takes longer is blocked."""

_CLEANUP_S: Final = 2 * DEFAULT_TIMEOUT_S
"""Seconds that a cancelled test has for its clean-up: leaving `running` waits for the responses, then the shutdown."""

_POSTPONE_S: Final = 0.01

_MAX_POSTPONEMENTS: Final = 200
"""How often an interruption waits for a destructor to end, which may hang as well: 2 s in all."""

_WEAKREF_FILES: Final = frozenset({weakref.__file__, _weakrefset.__file__})


class Expired(KeyboardInterrupt):
    """Raised in a test that takes too long.

    A KeyboardInterrupt, because asyncio lets only that and SystemExit out of a callback.
    """


class Interrupter:
    """Ends one test after its timeout, by the mildest means that works.

    1. An async test is cancelled in its event loop, by `bound`.
    2. Any other test is interrupted by SIGALRM. If it runs an event loop, that loop raises between two of its steps.
    3. A test that blocks its event loop is interrupted where it is.

    Args:
        timeout: Seconds of real time for the test; ``None`` means no limit.
        on_expired: A function to call before the test is ended, while its streams are still open.
    """

    def __init__(self, timeout: float | None, on_expired: Callable[[], None]) -> None:
        self._timeout = timeout
        self._on_expired = on_expired
        self._bounded = False
        self._expired = False
        self._interrupted = False
        self._over = False
        self._loop_asked = False  # the event loop is to end the test
        self._cleanup_awaited = False
        self._postponements = 0
        self._previous_handler: Any = None

    def bound(self, test: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[None]]:
        """Return the async test with its timeout in its own event loop."""
        self._bounded = self._timeout is not None

        @wraps(test)
        async def bounded(*args: Any, **kwargs: Any) -> None:
            try:
                if self._timeout is None:
                    await test(*args, **kwargs)
                else:
                    with real_deadline(self._timeout, self._expire):
                        await test(*args, **kwargs)
            except* Expired:  # leaving its task, it would end the event loop, which other tests may share
                pass

        return bounded

    def start(self) -> None:
        """Set the alarm, if this thread can have one."""
        # Python runs signal handlers in the main thread only, and another plugin may have set its own.
        if self._timeout is None or threading.current_thread() is not threading.main_thread():
            return
        if not hasattr(signal, "setitimer") or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
            return
        self._previous_handler = signal.signal(signal.SIGALRM, self._on_alarm)
        signal.setitimer(signal.ITIMER_REAL, self._timeout, _RETRY_INTERVAL_S)

    def stop(self) -> None:
        """Remove the alarm."""
        self._over = True  # a shared event loop may still call what was scheduled for this test
        if self._previous_handler is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._previous_handler)

    def _on_alarm(self, _: int, frame: FrameType | None) -> None:
        seconds = self._seconds_to_wait(frame)
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, seconds, _RETRY_INTERVAL_S)
        else:
            self._interrupt()

    def _seconds_to_wait(self, frame: FrameType | None) -> float:
        """Return how long milder means may take from now on, or 0 if the test must be interrupted where it is."""
        if not self._loop_asked and (self._bounded or self._ask_event_loop()):
            self._loop_asked = True
            return _LOOP_TURN_S
        if self._bounded and self._expired and not (self._interrupted or self._cleanup_awaited):
            self._cleanup_awaited = True  # the loop has cancelled the test, so it is not blocked
            return _CLEANUP_S
        if self._postponements < _MAX_POSTPONEMENTS and _swallows_exceptions(frame):
            self._postponements += 1
            return _POSTPONE_S
        return 0

    def _ask_event_loop(self) -> bool:
        """Let the event loop that runs in this thread end the test between two of its steps; return False without one.

        Elsewhere the loop may be in the middle of a step that it cannot leave half done: a coroutine that no task has
        taken yet would never be awaited.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            # Scheduled twice, so that it runs after the callbacks of a task that ended in this turn: one may stop the
            # loop.
            loop.call_soon_threadsafe(loop.call_soon, self._interrupt_from_asyncio)
            return True
        if (trio := sys.modules.get("trio")) is None:
            return False
        try:
            trio.lowlevel.current_trio_token().run_sync_soon(self._cancel_on_trio, trio.lowlevel.current_root_task)
        except RuntimeError:
            return False
        return True

    def _interrupt_from_asyncio(self) -> None:
        if not self._interrupted:  # else the loop was blocked and has been interrupted already
            self._interrupt()

    def _cancel_on_trio(self, current_root_task: Callable[[], Any]) -> None:
        # To trio, an exception out of a callback is an internal error. The innermost nursery of the root task has a
        # single task, which runs the function that was passed to trio.run().
        if not (self._over or self._interrupted):
            self._begin_interruption()
            current_root_task().child_nurseries[-1].cancel_scope.cancel()

    def _interrupt(self) -> None:
        if not self._over:
            self._begin_interruption()
            raise Expired

    def _begin_interruption(self) -> None:
        self._interrupted = True
        self._expire()
        # From now on, because the clean-up that follows may take as long.
        signal.setitimer(signal.ITIMER_REAL, _RETRY_INTERVAL_S, _RETRY_INTERVAL_S)

    def _expire(self) -> None:
        self._expired = True
        self._on_expired()


def _swallows_exceptions(frame: FrameType | None) -> bool:
    """Return whether Python would swallow an exception raised in `frame`, as in destructors and weakref callbacks."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename in _WEAKREF_FILES:
            return True
        frame = frame.f_back
    return False
