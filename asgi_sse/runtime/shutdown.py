"""Learns early that the server is stopping.

``lifespan.shutdown`` comes too late: uvicorn and hypercorn send it after the last response has ended,
and a stream has no end of its own. So a watch asks three sources, each of them best effort: the
process's signals, chained; uvicorn's ``Server.shutdown``, which also runs where no signal came; and
hypercorn's ``terminated`` event, since its workers get no signal. A server that is not known, or has
changed, leaves what is left of them, and the lifespan.
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

logger = logging.getLogger(__name__)

_HOOK: Final = "_asgi_sse_hook"
_HYPERCORN: Final = ("hypercorn.asyncio.run", "hypercorn.trio.run")


class ShutdownWatch:
    """Watches one server, from now until it is closed or nobody holds it any more.

    Args:
        server: The server; the caller runs in its event loop.
        stopping: A method, held weakly, that is called in the server's event loop when it stops: with the
            server, with what told it, and with whether that is certain. A signal is not: who handles it may
            let the server run on. May be called more than once.
        stopped: A method, held weakly, that is called with the server when it has stopped, if that is known.
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
            except Exception:  # a server that has changed inside: the other sources remain
                logger.debug("cannot watch all of the server's shutdown", exc_info=True)

    @property
    def alive(self) -> bool:
        """Whether the server's event loop has not come to its end."""
        return not self._server.loop.closed

    def fire(self, cause: str, *, certain: bool) -> None:
        """The server stops. Safe in a signal handler."""
        self._server.loop.call_threadsafe(partial(self._tell, cause, certain))

    def _tell(self, cause: str, certain: bool) -> None:  # noqa: FBT001
        stopping = self._stopping()
        if stopping is not None:
            stopping(self._server, cause, certain)

    def over(self) -> None:
        """The server has stopped."""
        stopped = self._stopped()
        if stopped is not None:
            stopped(self._server)

    def close(self) -> None:
        """Watch no longer, and leave everything as it was."""
        try:
            _signal_watches.discard(self)
            _restore_signals()
            if self._hook is not None:
                self._hook.remove(self)
        except Exception:
            logger.debug("cannot leave everything as it was", exc_info=True)

    def _watch_signals(self) -> None:
        # Python runs handlers in the main thread alone, and a server in another thread is not meant by them.
        if threading.current_thread() is not threading.main_thread():
            return
        _signal_watches.add(self)  # first: another watch that dies meanwhile would take our handlers away
        if _chain_signals():
            weakref.finalize(self, _restore_signals).atexit = False
        else:
            _signal_watches.discard(self)

    def _watch_server(self) -> None:
        server = self._server
        found = [(server.config, server.config)] if _tells(server.config) else []
        found = found or [
            (config, watched)
            for config, watched in _running_servers(server)
            if server.covers(Server(server.loop, config, getattr(watched, "server_state", watched)))
        ]
        if len(found) != 1:  # of several, an unknown one may be any
            logger.debug("%d servers found to watch; signals and the lifespan remain", len(found))
            return
        _, watched = found[0]
        hook: ShutdownHook | _UvicornHook | _HypercornHook
        if _tells(watched):
            hook = watched.shutdown_hook
        elif hasattr(watched, "terminated"):
            hook = _HypercornHook.over(watched, server.loop)
        else:
            hook = _UvicornHook.over(watched)
        self._hook = hook
        hook.watches.add(self)


def _running_servers(server: Server) -> Iterator[tuple[Any, Any]]:
    """The servers that run in this event loop, each with its configuration.

    Found in the frames of its tasks, since nothing that a request holds leads to them.
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
            elif module in _HYPERCORN:
                watched, config = frame.f_locals.get("context"), frame.f_locals.get("config")
            elif module == "asgi_sse.testing.server":
                watched = config = frame.f_locals.get("self")
            known = hasattr(watched, "shutdown") or hasattr(watched, "terminated") or _tells(watched)
            if known and config is not None and id(watched) not in seen:
                seen.add(id(watched))
                yield config, watched
            step = getattr(step, "cr_await", None)


class ShutdownHook:
    """Of a server that tells by itself, as that of `asgi_sse.testing` does.

    It is the attribute ``shutdown_hook`` of such a server, which is its own `Server.config`.
    """

    def __init__(self) -> None:
        self.watches: weakref.WeakSet[ShutdownWatch] = weakref.WeakSet()

    def stopping(self) -> None:
        """Tell who watches that the server stops."""
        for watch in list(self.watches):
            watch.fire("the server is shutting down", certain=True)

    def stopped(self) -> None:
        """Tell who watches that it has stopped."""
        for watch in list(self.watches):
            watch.over()

    def remove(self, watch: ShutdownWatch) -> None:
        """`watch` watches no longer."""
        self.watches.discard(watch)


def _tells(server: Any) -> bool:
    return isinstance(getattr(server, "shutdown_hook", None), ShutdownHook)


# uvicorn


class _UvicornHook:
    """Stands before the ``shutdown`` of one uvicorn server: tells who watches, then does what it did."""

    def __init__(self, server: Any) -> None:
        # Weak, and no bound method: the server holds us, and would hold its event loop.
        self._server = weakref.ref(server)
        self._replaced = vars(server).get("shutdown")  # by somebody else, before us
        self.watches: weakref.WeakSet[ShutdownWatch] = weakref.WeakSet()

    @classmethod
    def over(cls, server: Any) -> "_UvicornHook":
        """The hook of `server`: there is one, however many watch."""
        hook = vars(server).get("shutdown")
        if not isinstance(hook, cls):
            hook = server.shutdown = cls(server)
        return hook

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for watch in list(self.watches):
            watch.fire("uvicorn is shutting down", certain=True)
        server = self._server()
        try:
            if self._replaced is not None:
                return await self._replaced(*args, **kwargs)
            return await type(server).shutdown(server, *args, **kwargs)  # type: ignore[union-attr]
        finally:
            for watch in list(self.watches):
                watch.over()

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
    """Waits for the ``terminated`` event of one hypercorn server, and tells who watches."""

    def __init__(self, context: Any) -> None:
        self._terminated = context.terminated
        self.watches: weakref.WeakSet[ShutdownWatch] = weakref.WeakSet()

    @classmethod
    def over(cls, context: Any, loop: EventLoop) -> "_HypercornHook":
        """The hook of the server with this context: there is one, however many watch."""
        hook = vars(context).get(_HOOK)
        if not isinstance(hook, cls):
            hook = cls(context)
            setattr(context, _HOOK, hook)
            # Without the variables of the request that happens to be the first.
            contextvars.Context().run(loop.spawn, hook._wait, "asgi_sse shutdown watch")
        return hook

    async def _wait(self) -> None:
        try:
            await self._terminated.wait()
        except Exception:
            logger.debug("cannot wait for hypercorn's shutdown", exc_info=True)
            return
        for watch in list(self.watches):
            watch.fire("hypercorn is shutting down", certain=True)

    def remove(self, watch: ShutdownWatch) -> None:
        self.watches.discard(watch)


# Signals

_signal_watches: "weakref.WeakSet[ShutdownWatch]" = weakref.WeakSet()


class _Chained:
    """Our handler of one signal, with the one that was there before, which alone decides what becomes of it."""

    def __init__(self, previous: Callable[[int, FrameType | None], Any]) -> None:
        self.previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for watch in list(_signal_watches):
            watch.fire(signal.Signals(number).name, certain=False)
        self.previous(number, frame)


def _signals() -> Iterator[signal.Signals]:
    """What stops a server. gunicorn's SIGQUIT does; elsewhere it is often taken to write out stacks."""
    names = ["SIGINT", "SIGTERM", "SIGBREAK", *(["SIGQUIT"] if "gunicorn" in sys.modules else [])]
    return (getattr(signal, name) for name in names if hasattr(signal, name))


def _chain_signals() -> bool:
    """Put our handler before each that a server has set. Whether there is any."""
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
    """Whether it is a handler of Python's own, for KeyboardInterrupt: no server stops by it in an orderly way."""
    if handler is signal.default_int_handler:
        return True
    if isinstance(handler, functools.partial):  # asyncio.Runner's
        return isinstance(getattr(handler.func, "__self__", None), asyncio.Runner)
    return str(getattr(handler, "__module__", None)).startswith("trio.")


def _restore_signals() -> None:
    """Take our handlers away, if nobody needs them, and nobody has put another one over them."""
    if threading.current_thread() is not threading.main_thread():
        return  # without a watch they do no more than to call what was there
    if any(watch.alive for watch in list(_signal_watches)):
        return
    for number in _signals():
        handler = signal.getsignal(number)
        if isinstance(handler, _Chained):
            signal.signal(number, handler.previous)
