"""`Presence`: calls the hooks of an app when subscriptions begin and end."""

from __future__ import annotations

import logging
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio

from asgi_sse.errors import printable
from asgi_sse.runtime.current import current_loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_sse.runtime.base import Child, EventLoop

logger: Final = logging.getLogger(__name__)


_CLOSE_WAIT_S: Final = 10.0
"""Seconds that running hooks have to return when their broker closes."""


class Named(Protocol):
    """The subscription that the hooks get. Only its names matter here."""

    @property
    def names(self) -> tuple[str, ...]:
        """The channels, and patterns of channels."""
        ...


class Presence:
    """Calls the hooks of a broker in the event loop of the subscriber. An error of a hook is logged.

    Args:
        on_join: Called with each subscription when it is first read; ``None`` for no hook.
        on_leave: Called with each subscription when it has ended; ``None`` for no hook.
    """

    def __init__(self, on_join: Callable[[Any], Any] | None, on_leave: Callable[[Any], Any] | None) -> None:
        self._on_join = on_join
        self._on_leave = on_leave
        # The latest running hook of each subscription: its loop, an event that is set when it has returned, and its
        # task. The task is kept because asyncio has only weak references to tasks.
        self._running: dict[Named, tuple[EventLoop, anyio.Event, Child]] = {}

    def call_on_join(self, subscription: Named) -> None:
        """Call ``on_join``."""
        self._call("on_join", self._on_join, subscription)

    def call_on_leave(self, subscription: Named) -> None:
        """Call ``on_leave``, after ``on_join`` has returned."""
        self._call("on_leave", self._on_leave, subscription)

    async def wait(self) -> None:
        """Wait until all hooks of this event loop have returned. Cancel them after 10 seconds."""
        loop = current_loop()
        with anyio.move_on_after(_CLOSE_WAIT_S) as scope:
            # A loop runs callbacks in order. Those that end the subscriptions, and so call the hooks, come first.
            earlier_callbacks_ran = anyio.Event()
            loop.call_threadsafe(earlier_callbacks_ran.set)
            await earlier_callbacks_ran.wait()
            while running := [returned for own, returned, _ in self._running.values() if own is loop]:
                await running[0].wait()
        if scope.cancelled_caught:
            for subscription, (own, _, child) in list(self._running.items()):
                if own is loop:
                    logger.warning(
                        "a hook of a subscription of %s did not return within %g s and is cancelled",
                        _names(subscription), _CLOSE_WAIT_S, extra={"sse_channel": _names(subscription)},
                    )  # fmt: skip
                    child.cancel()

    def _call(self, name: str, hook: Callable[[Any], Any] | None, subscription: Named) -> None:
        if hook is None:
            return
        if subscription in self._running:  # on_leave may undo what on_join does, so it has to come after it
            self._spawn(name, partial(hook, subscription), subscription)
            return
        try:
            result = hook(subscription)
        except Exception:
            logger.exception(*_error_of(name, subscription), extra={"sse_channel": _names(subscription)})
            return
        if isawaitable(result):
            self._spawn(name, lambda: result, subscription)

    def _spawn(self, name: str, call: Callable[[], Any], subscription: Named) -> None:
        loop, returned = current_loop(), anyio.Event()
        earlier = self._running.get(subscription)

        async def run() -> None:
            try:
                if earlier is not None and earlier[0] is loop:
                    await earlier[1].wait()
                result = call()
                if isawaitable(result):
                    await result
            except Exception:
                logger.exception(*_error_of(name, subscription), extra={"sse_channel": _names(subscription)})
            finally:
                if self._running[subscription][1] is returned:
                    del self._running[subscription]
                returned.set()

        self._running[subscription] = loop, returned, loop.spawn(run, f"asgi_sse {name}")


def _error_of(hook: str, subscription: Named) -> tuple[str, str, str]:
    return "%s of a subscription of %s raised", hook, _names(subscription)


def _names(subscription: Named) -> str:
    # The names only: the repr of a subscription has the id that its client sent. The names are cut for the log,
    # because a client may choose a hundred of them.
    return printable(" ".join(subscription.names))
