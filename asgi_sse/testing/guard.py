"""`Guard`: what the pytest plugin puts around one test, to limit its real time and to find streams left open."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, Final

import anyio

from asgi_sse.protocol.validation import check_number
from asgi_sse.stream.observer import Observer, process_observers
from asgi_sse.stream.stream import Stream

from .clock import unwrap_virtual_time, virtual_time
from .interrupter import Expired, Interrupter
from .request import AppRequest, open_requests

_LEAK_GRACE_S: Final = 1.0
"""Seconds that streams have to end after the test, whose clients have just left."""

_POLL_INTERVAL_S: Final = 0.01

_HINT: Final = (
    "If it waits for a response: httpx's ASGITransport and Starlette's TestClient return none until the app has "
    "returned; use open_stream() or StreamingASGITransport of asgi_sse.testing"
)


class _BegunStreams(Observer):
    """Records every stream that begins."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def begun(self, stream: Stream) -> None:
        """Record the stream."""
        self.streams.append(stream)


class Guard:
    """Ends one test after `timeout` and reports the streams that are open then or left at its end.

    Args:
        timeout: Seconds of real time for the test; ``None`` means no limit. Default: 10.
        leaks: Whether a stream that is left open is a failure. Default: True.

    Attributes:
        failure: The text of the failure, or an empty string.

    Raises:
        TypeError: `timeout` is not a number.
        ValueError: `timeout` is not more than 0.
    """

    def __init__(self, timeout: float | None = 10.0, *, leaks: bool = True) -> None:
        check_number("timeout", timeout, optional=True, positive=True)
        self.failure: str = ""
        self._timeout = timeout
        self._leaks = leaks
        self._interrupter = Interrupter(timeout, self._report_timeout)
        self._checks_in_loop = False
        self._begun = _BegunStreams()
        self._open_before: set[AppRequest] = set()
        self._stop_observing: Callable[[], None] | None = None

    @staticmethod
    def can_wrap(test: Any) -> bool:
        """Return whether `wrap` works for `test`. Hypothesis calls its tests many times, from a function of its own."""
        return (iscoroutinefunction(test) or unwrap_virtual_time(test) is not None) and not hasattr(test, "hypothesis")

    def wrap(self, test: Callable[..., Any]) -> Callable[..., Any]:
        """Return an async test with its timeout and its check for leaks in its own event loop."""
        self._checks_in_loop = True
        virtual = unwrap_virtual_time(test)
        if virtual is None:
            return self._wrap_async(test)
        coroutine_function, backend = virtual
        return virtual_time(backend=backend)(self._wrap_async(coroutine_function))

    def _wrap_async(self, test: Callable[..., Any]) -> Callable[..., Any]:
        bounded = self._interrupter.bound(test)

        @wraps(test)
        async def guarded(*args: Any, **kwargs: Any) -> None:
            await bounded(*args, **kwargs)
            with anyio.move_on_after(_LEAK_GRACE_S):
                while self._has_leaks():  # noqa: ASYNC110 (a stream may end in another thread)
                    await anyio.sleep(_POLL_INTERVAL_S)
            self._report_leaks()

        return guarded

    def wrap_unittest(self, test: Callable[..., Any], fail: Callable[[str], object]) -> Callable[..., Any]:
        """Return a test of unittest with its timeout.

        It calls `fail` in place of raising, because unittest runs no clean-up after a KeyboardInterrupt.
        """
        if iscoroutinefunction(test):
            bounded = self._interrupter.bound(test)

            @wraps(test)
            async def guarded_async() -> None:
                await bounded()
                if self.failure:
                    fail(self.failure)

            return guarded_async

        @wraps(test)
        def guarded() -> None:
            with suppress(Expired):
                test()
            if self.failure:
                fail(self.failure)

        return guarded

    def __enter__(self) -> None:
        self._open_before = set(open_requests)
        self._stop_observing = process_observers.add(self._begun)
        self._interrupter.start()

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._interrupter.stop()
        if self._stop_observing is not None:
            self._stop_observing()
        if kind is None and not self._checks_in_loop:
            deadline = time.monotonic() + _LEAK_GRACE_S
            while self._has_leaks() and time.monotonic() < deadline:
                time.sleep(_POLL_INTERVAL_S)
            self._report_leaks()
        self._begun.streams.clear()

    def _report_timeout(self) -> None:
        lines = [f"the test has not ended within {self._timeout:g} s", *self._describe_open(), _HINT]
        self.failure = self.failure or ".\n".join(lines)

    def _has_leaks(self) -> bool:
        return self._leaks and not self.failure and bool(self._describe_open())

    def _report_leaks(self) -> None:
        if self._has_leaks():
            lines = ["the test leaves streams open", *self._describe_open()]
            self.failure = ".\n".join([*lines, "Leave the block of open_stream(), or end what runs the app"])

    def _describe_open(self) -> list[str]:
        """Return one line for each stream and request that began in the test and is open."""
        lines = [
            f"  {stream!r}, a source that was not cleaned up within its cleanup_timeout"
            if stream.abandoned
            else f"  {stream!r}, {stream.events} events"
            for stream in self._begun.streams
            if stream.state != "closed" or stream.abandoned
        ]
        return lines + [f"  {request!r}" for request in open_requests if request not in self._open_before]
