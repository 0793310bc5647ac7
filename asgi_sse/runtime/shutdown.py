"""Early notice that the server is stopping.

``lifespan.shutdown`` comes too late. uvicorn and hypercorn send it after the last response has ended, and
a stream does not end by itself. So a watch uses three sources:

- the signals of the process, with our handler chained before the server's;
- uvicorn's ``Server.shutdown``, which also runs without a signal;
- hypercorn's ``terminated`` event, because hypercorn's workers get no signal.

Each source is best effort. If the server is unknown, or its internals have changed, the other sources and
the lifespan remain.
"""

import asyncio
import contextvars
import functools
import logging
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, Final

from .base import EventLoop
from .server import Server

logger: Final = logging.getLogger(__name__)

_HOOK_ATTRIBUTE: Final = "_asgi_sse_hook"
_HYPERCORN_MODULES: Final = ("hypercorn.asyncio.run", "hypercorn.trio.run")


class ShutdownWatch:
    """Watches one server until the watch is closed or collected.

    Args:
        server: The server. The caller runs in its event loop.
        stopping: A method that is called in the server's event loop when the server stops. Its arguments are
            the server, the cause, and whether the stop is certain. A signal is not certain, because its
            handler may let the server continue. May be called more than once. Held weakly.
        stopped: A method that is called with the server when it has stopped, if the server reveals that.
            Held weakly.
    """

    def __init__(
        self,
        server: Server,
        stopping: Callable[[Server, str, bool], None],
        stopped: Callable[[Server], None],
    ) -> None:
        self._server = server
        self._stopping = weakref.WeakMethod(stopping)
        self._stopped = weakref.WeakMethod(stopped)
        self._hook: ShutdownHook | _UvicornHook | _HypercornHook | None = None
        for watch in (self._watch_signals, self._watch_server):
            try:
                watch()
            except Exception:  # the internals of the server have changed; the other sources remain
                logger.debug("cannot watch all of the server's shutdown", exc_info=True)

    @property
    def alive(self) -> bool:
        """Whether the server's event loop has not ended."""
        return not self._server.loop.closed

    def notify_stopping(self, cause: str, *, certain: bool) -> None:
        """Report that the server is stopping. Safe in a signal handler.

        Args:
            cause: What revealed it.
            certain: Whether the server is sure to stop.
        """
        self._server.loop.call_threadsafe(partial(self._call_stopping, cause, certain))

    def _call_stopping(self, cause: str, certain: bool) -> None:  # noqa: FBT001
        stopping = self._stopping()
        if stopping is not None:
            stopping(self._server, cause, certain)

    def notify_stopped(self) -> None:
        """Report that the server has stopped."""
        stopped = self._stopped()
        if stopped is not None:
            stopped(self._server)

    def close(self) -> None:
        """End the watch and restore the signal handlers and the server's hook."""
        try:
            _signal_watches.discard(self)
            _restore_signals()
            if self._hook is not None:
                self._hook.remove(self)
        except Exception:
            logger.debug("cannot restore the server's shutdown and the signal handlers", exc_info=True)

    def _watch_signals(self) -> None:
        # Python runs signal handlers in the main thread only. A signal does not concern a server in another thread.
        if threading.current_thread() is not threading.main_thread():
            return
        _signal_watches.add(self)  # first, or a watch that is collected meanwhile would remove our handlers
        if _chain_signals():
            weakref.finalize(self, _restore_signals).atexit = False
        else:
            _signal_watches.discard(self)

    def _watch_server(self) -> None:
        server = self._server
        found = [(server.config, server.config)] if _has_hook(server.config) else []
        found = found or [
            (config, watched)
            for config, watched in _running_servers(server)
            if server.covers(Server(server.loop, config, getattr(watched, "server_state", watched)))
        ]
        if len(found) != 1:  # if there are several, ours may be any of them
            logger.debug("found %d servers to watch; only signals and the lifespan report a shutdown", len(found))
            return
        _, watched = found[0]
        hook: ShutdownHook | _UvicornHook | _HypercornHook
        if _has_hook(watched):
            hook = watched.shutdown_hook
        elif hasattr(watched, "terminated"):
            hook = _HypercornHook.for_context(watched, server.loop)
        else:
            hook = _UvicornHook.for_server(watched)
        self._hook = hook
        hook.watches.add(self)


def _running_servers(server: Server) -> Iterator[tuple[Any, Any]]:
    """Yield the configuration and the object of each server that runs in the event loop of `server`.

    They are found in the frames of the loop's tasks, because no object that a request holds leads to them.
    """
    seen = set()
    for coroutine in server.loop.coroutines():
        step: Any = coroutine
        while step is not None:
            frame: Any = getattr(step, "cr_frame", None)
            module = frame and frame.f_globals.get("__name__")
            watched = config = None
            if module == "uvicorn.server":
                watched = frame.f_locals.get("self")
                config = getattr(watched, "config", None)
            elif module in _HYPERCORN_MODULES:
                watched, config = frame.f_locals.get("context"), frame.f_locals.get("config")
            elif module == "asgi_sse.testing.server":
                watched = config = frame.f_locals.get("self")
            known = hasattr(watched, "shutdown") or hasattr(watched, "terminated") or _has_hook(watched)
            if known and config is not None and id(watched) not in seen:
                seen.add(id(watched))
                yield config, watched
            step = getattr(step, "cr_await", None)


class ShutdownHook:
    """The hook of a server that reports its shutdown itself, such as the server of `asgi_sse.testing`.

    Such a server has this object as its attribute ``shutdown_hook``, and is its own `Server.config`.

    Attributes:
        watches: The watches of the server.
    """

    def __init__(self) -> None:
        self.watches: weakref.WeakSet[ShutdownWatch] = weakref.WeakSet()

    def stopping(self) -> None:
        """Report to the watches that the server is stopping."""
        for watch in list(self.watches):
            watch.notify_stopping("the server is shutting down", certain=True)

    def stopped(self) -> None:
        """Report to the watches that the server has stopped."""
        for watch in list(self.watches):
            watch.notify_stopped()

    def remove(self, watch: ShutdownWatch) -> None:
        """Remove `watch`."""
        self.watches.discard(watch)


def _has_hook(server: Any) -> bool:
    return isinstance(getattr(server, "shutdown_hook", None), ShutdownHook)


# uvicorn


class _UvicornHook:
    """Replaces the ``shutdown`` of one uvicorn server: notifies the watches, then calls the original."""

    def __init__(self, server: Any) -> None:
        # Weak, and without a bound method: the server holds this hook, and a cycle would keep its event loop alive.
        self._server = weakref.ref(server)
        self._replaced = vars(server).get("shutdown")  # a replacement that was there before ours
        self.watches: weakref.WeakSet[ShutdownWatch] = weakref.WeakSet()

    @classmethod
    def for_server(cls, server: Any) -> "_UvicornHook":
        """Return the hook of `server`, which all its watches share."""
        hook = vars(server).get("shutdown")
        if not isinstance(hook, cls):
            hook = server.shutdown = cls(server)
        return hook

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for watch in list(self.watches):
            watch.notify_stopping("uvicorn is shutting down", certain=True)
        server = self._server()
        try:
            if self._replaced is not None:
                return await self._replaced(*args, **kwargs)
            return await type(server).shutdown(server, *args, **kwargs)  # type: ignore[union-attr]
        finally:
            for watch in list(self.watches):
                watch.notify_stopped()

    def remove(self, watch: ShutdownWatch) -> None:
        self.watches.discard(watch)
        server = self._server()
        if not self.watches and server is not None and vars(server).get("shutdown") is self:
            if self._replaced is None:
                del server.shutdown
            else:
                server.shutdown = self._replaced


# hypercorn


class _HypercornHook:
    """Waits for the ``terminated`` event of one hypercorn server, then notifies the watches."""

    def __init__(self, context: Any) -> None:
        self._terminated = context.terminated
        self.watches: weakref.WeakSet[ShutdownWatch] = weakref.WeakSet()

    @classmethod
    def for_context(cls, context: Any, loop: EventLoop) -> "_HypercornHook":
        """Return the hook of the server with this context, which all its watches share."""
        hook = vars(context).get(_HOOK_ATTRIBUTE)
        if not isinstance(hook, cls):
            hook = cls(context)
            setattr(context, _HOOK_ATTRIBUTE, hook)
            # In an empty context, without the variables of the request that happens to be the first.
            contextvars.Context().run(loop.spawn, hook._wait, "asgi_sse shutdown watch")
        return hook

    async def _wait(self) -> None:
        try:
            await self._terminated.wait()
        except Exception:
            logger.debug("cannot wait for hypercorn's shutdown", exc_info=True)
            return
        for watch in list(self.watches):
            watch.notify_stopping("hypercorn is shutting down", certain=True)

    def remove(self, watch: ShutdownWatch) -> None:
        self.watches.discard(watch)


# Signals

_signal_watches: "weakref.WeakSet[ShutdownWatch]" = weakref.WeakSet()


class _Chained:
    """Our handler of one signal: notifies the watches, then calls the previous handler, which decides what to do."""

    def __init__(self, previous: Callable[[int, FrameType | None], Any]) -> None:
        self.previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for watch in list(_signal_watches):
            watch.notify_stopping(signal.Signals(number).name, certain=False)
        self.previous(number, frame)


def _signals() -> Iterator[signal.Signals]:
    """Return the signals that stop a server.

    SIGQUIT stops gunicorn's workers. In other servers it often prints stack traces, so it is left out there.
    """
    names = ["SIGINT", "SIGTERM", "SIGBREAK", *(["SIGQUIT"] if "gunicorn" in sys.modules else [])]
    return (getattr(signal, name) for name in names if hasattr(signal, name))


def _chain_signals() -> bool:
    """Chain our handler before each handler that a server has set; return whether there is one."""
    chained = False
    for number in _signals():
        handler = signal.getsignal(number)
        if not isinstance(handler, _Chained):
            if not callable(handler) or _is_default(handler):
                continue
            signal.signal(number, _Chained(handler))
        chained = True
    return chained


def _is_default(handler: Any) -> bool:
    """Return whether `handler` only raises KeyboardInterrupt: no server shuts down in an orderly way through that."""
    if handler is signal.default_int_handler:
        return True
    if isinstance(handler, functools.partial):  # asyncio.Runner's
        return isinstance(getattr(handler.func, "__self__", None), asyncio.Runner)
    return str(getattr(handler, "__module__", None)).startswith("trio.")


def _restore_signals() -> None:
    """Remove our handlers if no watch needs them, except where another handler has been set over ours."""
    if threading.current_thread() is not threading.main_thread():
        return  # without a watch, our handlers only call the previous ones
    if any(watch.alive for watch in list(_signal_watches)):
        return
    for number in _signals():
        handler = signal.getsignal(number)
        if isinstance(handler, _Chained):
            signal.signal(number, handler.previous)
