"""`AppTask`: one call of an app, which runs beside the test."""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import ASGIApp
from asgi_sse.runtime.current import current_loop

from .clock import real_deadline

if TYPE_CHECKING:
    from asgi_sse.runtime.base import Child

DEFAULT_TIMEOUT_S: Final = 15.0
"""Seconds of real time for each phase of an app, such as its response start, its start-up and its return after a
disconnect. More than the default ``cleanup_timeout`` of 10 s."""

_FORCED_CLEANUP_S: Final = 1.0
"""Seconds of real time that a cancelled app has to return."""


def check_app(app: ASGIApp) -> None:
    """Raise if `app` cannot be an ASGI app.

    Raises:
        TypeError: `app` is not callable.
    """
    if not callable(app):
        raise TypeError(f"app must be an ASGI app, got {short_repr(app)}; pass what you pass to a server")


class AppTask:
    """One call of an app in a task of its own, and the condition that the test and the app wait on.

    Attributes:
        returned: Whether the app has returned or raised.
    """

    def __init__(self) -> None:
        self.returned: bool = False
        self._child: Child | None = None
        self._changed = anyio.Event()
        self._error: BaseException | None = None  # what the app raised, until the test has seen it
        self._error_id = 0  # only the id: holding the exception would hold its frames

    def start(self, call: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """Run `call` in a task that is called `name`."""
        # No task group owns the task, because pytest-asyncio ends a fixture in another task than it began in.
        self._child = current_loop().spawn(partial(self._run, call), name)

    async def _run(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await call()
        except GeneratorExit:  # the event loop was closed, so nothing can be woken any more
            raise
        except anyio.get_cancelled_exc_class():
            self._return()
            raise
        except BaseException as exc:  # for the test, not for the event loop
            self._error = exc
        self._return()

    def _return(self) -> None:
        self.returned = True
        self.notify()

    def notify(self) -> None:
        """Wake everything that waits for a change."""
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_for_change(self) -> None:
        """Wait for the next `notify`."""
        await self._changed.wait()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` is true. It is checked after each `notify`."""
        while not condition():
            await self._changed.wait()

    async def wait_returned(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds of real time for the app to return; return whether it did."""
        with real_deadline(timeout):
            await self.wait_until(lambda: self.returned)
        return self.returned

    async def cancel(self) -> bool:
        """Cancel the app and return whether it returned within a second."""
        if self._child is None:
            return True
        self._child.cancel()
        return await self.wait_returned(_FORCED_CLEANUP_S)

    def force_cancel(self) -> None:
        """Interrupt the app even in its clean-up."""
        if self._child is not None:
            self._child.force_cancel()

    def raise_error(self) -> None:
        """Raise what the app raised, once."""
        error, self._error = self._error, None
        if error is not None:
            self._error_id = id(error)
            raise error

    def is_app_error(self, exc: BaseException) -> bool:
        """Return whether `raise_error` raised `exc`, so that an app's own TimeoutError is not taken for ours."""
        return id(exc) == self._error_id
