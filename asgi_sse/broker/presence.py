"""`Presence`: tells an app who joined a channel, and who left."""

from __future__ import annotations

import logging
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final

import anyio

from asgi_sse.errors import printable
from asgi_sse.runtime.current import current_loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_sse.runtime.base import Child, EventLoop

    from .subscription import Subscription

logger = logging.getLogger(__name__)


_PATIENCE: Final = 10.0
"""Seconds that hooks have when their broker is closed."""


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
        # The latest hook under way for each: its loop, what is set when it has returned, its task (asyncio keeps none).
        self._latest: dict[Subscription, tuple[EventLoop, anyio.Event, Child]] = {}

    def joined(self, subscription: Subscription) -> None:
        """`subscription` is read from now on."""
        self._call("on_join", self._on_join, subscription)

    def left(self, subscription: Subscription) -> None:
        """`subscription` is not read any more."""
        self._call("on_leave", self._on_leave, subscription)

    async def wait(self) -> None:
        """Wait until all hooks that are under way in this event loop have returned, but not for long."""
        loop = current_loop()
        with anyio.move_on_after(_PATIENCE) as scope:
            asked_before = anyio.Event()  # a loop makes its calls in order: those by which readers leave come first
            loop.call_threadsafe(asked_before.set)
            await asked_before.wait()
            while under_way := [done for own, done, _ in self._latest.values() if own is loop]:
                await under_way[0].wait()
        if scope.cancelled_caught:
            for subscription, (own, _, child) in list(self._latest.items()):
                if own is loop:
                    logger.warning(
                        "a hook for %s did not return within %g s and is cancelled", _names(subscription), _PATIENCE,
                        extra={"sse_channel": _names(subscription)},
                    )  # fmt: skip
                    child.cancel()

    def _call(self, name: str, hook: Callable[[Subscription], Any] | None, subscription: Subscription) -> None:
        if hook is None:
            return
        if subscription in self._latest:  # what is done when one leaves may undo what was done when that one came
            self._spawn(name, partial(hook, subscription), subscription)
            return
        try:
            result = hook(subscription)
        except Exception:
            logger.exception(*_about(name, subscription), extra={"sse_channel": _names(subscription)})
            return
        if isawaitable(result):
            self._spawn(name, lambda: result, subscription)

    def _spawn(self, name: str, call: Callable[[], Any], subscription: Subscription) -> None:
        loop, done = current_loop(), anyio.Event()
        before = self._latest.get(subscription)

        async def run() -> None:
            try:
                if before is not None and before[0] is loop:
                    await before[1].wait()
                result = call()
                if isawaitable(result):
                    await result
            except Exception:
                logger.exception(*_about(name, subscription), extra={"sse_channel": _names(subscription)})
            finally:
                if self._latest[subscription][1] is done:
                    del self._latest[subscription]
                done.set()

        self._latest[subscription] = loop, done, loop.spawn(run, f"asgi_sse {name}")


def _names(subscription: Subscription) -> str:
    # Not its repr, which has the id that its client has sent.
    return printable(" ".join(subscription.names))  # which its client may have chosen, and a hundred of them


def _about(hook: str, subscription: Subscription) -> tuple[str, str, str]:
    return "%s of a subscription of %s raised", hook, _names(subscription)
