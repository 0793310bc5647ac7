"""`Presence`: tells an app who joined a channel, and who left."""

from __future__ import annotations

import logging
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

import anyio

from .._eventloop import Child, current_loop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .subscription import Subscription

logger = logging.getLogger(__name__)


class Presence:
    """Calls the hooks of a broker, in the event loop of the subscriber; what they raise is logged.

    Args:
        on_join: Called with each subscription that begins to be read.
        on_leave: Called with each that is not read any more.
    """

    def __init__(
        self, on_join: Callable[[Subscription], Any] | None, on_leave: Callable[[Subscription], Any] | None
    ) -> None:
        self._on_join = on_join
        self._on_leave = on_leave
        self._latest: dict[Subscription, anyio.Event] = {}  # hooks under way, each set when it has returned
        self._children: dict[anyio.Event, Child] = {}  # or asyncio could collect a task that still runs

    def joined(self, subscription: Subscription) -> None:
        """`subscription` is read from now on."""
        self._call("on_join", self._on_join, subscription)

    def left(self, subscription: Subscription) -> None:
        """`subscription` is not read any more."""
        self._call("on_leave", self._on_leave, subscription)

    async def wait(self) -> None:
        """Wait until all hooks that are under way in this event loop have returned."""
        while self._latest:
            await next(iter(self._latest.values())).wait()

    def _call(self, name: str, hook: Callable[[Subscription], Any] | None, subscription: Subscription) -> None:
        if hook is None:
            return
        try:
            result = hook(subscription)
        except Exception:
            logger.exception("%s(%r) raised", name, subscription)
            return
        if isawaitable(result):
            self._spawn(name, result, subscription)

    def _spawn(self, name: str, result: Awaitable[Any], subscription: Subscription) -> None:
        before, done = self._latest.get(subscription), anyio.Event()

        async def run() -> None:
            try:
                if before is not None:  # what is done when one leaves may undo what was done when that one came
                    await before.wait()
                await result
            except Exception:
                logger.exception("%s(%r) raised", name, subscription)
            finally:
                if self._latest.get(subscription) is done:
                    del self._latest[subscription]
                del self._children[done]
                done.set()

        self._latest[subscription] = done
        self._children[done] = current_loop().spawn(run, f"asgi_sse {name}")
