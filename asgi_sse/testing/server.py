"""`running`: an app between its start-up and its shutdown, as a server has it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio

from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import ASGIApp, Message, Receive, Scope, Send
from asgi_sse.runtime import lifespan
from asgi_sse.runtime.current import current_loop
from asgi_sse.runtime.shutdown import ShutdownHook

from .clock import real_deadline

if TYPE_CHECKING:
    from asgi_sse.runtime.base import Child

_TASK_ENDS: Final = 1.0
"""Seconds in which an app returns from its lifespan, or raises, after it has sent its last message."""


class RunningApp:
    """An app that has started up. Made by `running`.

    It is an ASGI app itself: give it to `open_stream` and to `StreamingASGITransport` in place of the app.

    Attributes:
        state: What the app has put into the lifespan's state: each request has a copy of it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._requests: list[Scope] = []
        self._changed = anyio.Event()
        self._child: Child | None = None
        self._sent: list[Message] = []
        self._asked = False
        self._stopping = False
        self._stopped = False
        self._returned = False
        self._error: Exception | None = None
        # What `server.server_of` finds behind each send: by it, the streams of two servers are told apart.
        self.config = self
        self.shutdown_hook = ShutdownHook()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection.

        Raises:
            RuntimeError: The server has stopped.
            Exception: What the app raised.
        """
        if self._stopped:
            raise RuntimeError(
                f"{scope.get('path', '/')}: this server has stopped, and takes no request; open the stream before "
                "stop(), or enter running() again"
            )
        scope = {**scope, "state": {**self.state, **scope.get("state", {})}}
        self._requests.append(scope)
        try:
            await self._app(scope, receive, _Connection(self, send).send)
        finally:
            self._requests = [other for other in self._requests if other is not scope]
            self._notify()

    async def start(self, timeout: float) -> None:
        """Run the app's start-up. See `running`."""
        self._child = current_loop().spawn(self._run, "asgi_sse.testing lifespan")
        with real_deadline(timeout):
            await self._until(lambda: bool(self._sent) or self._returned)
        if not (self._sent or self._returned):
            raise TimeoutError(
                f"the start-up of {short_repr(self._app)} has not completed within {timeout:g} s; give running() another "
                "timeout if it may take longer"
            )
        await self._check("startup")

    async def stop(self, timeout: float = 15.0) -> None:
        """Stop as a server does on SIGTERM: tell the streams, wait for the responses, run the shutdown.

        The event streams under way end as they do when their server stops: properly, at once or with their
        farewell, and their clients are told when to return. Idempotent. `running` calls it at its end.

        Args:
            timeout: Seconds of real time for the responses, and again for the shutdown.

        Raises:
            AssertionError: A response goes on: a server would wait for it for ever, or cut it.
            TimeoutError: The shutdown did not complete.
            RuntimeError: It failed.
            Exception: What the app raised in it.
        """
        if self._stopping:
            return
        self._stopping = True
        self.shutdown_hook.stopping()
        with real_deadline(timeout):
            await self._until(lambda: not self._requests)
        left = [f"{scope.get('method', scope['type'])} {scope['path']}" for scope in self._requests]
        self._stopped = True
        self._asked = True
        self._notify()
        try:
            with real_deadline(timeout):
                await self._until(lambda: len(self._sent) > 1 or self._returned)
        finally:
            self.shutdown_hook.stopped()
        if left:
            raise AssertionError(
                f"{', '.join(left)}: still running {timeout:g} s after the server began to stop. A deploy hangs here: "
                "answer with an EventSourceResponse, or put SSEMiddleware around the app, which ends its streams"
            )
        if not (len(self._sent) > 1 or self._returned):
            raise TimeoutError(f"the shutdown of {short_repr(self._app)} has not completed within {timeout:g} s")
        await self._check("shutdown")

    async def leave(self) -> None:
        """Nobody asks the app for anything more: it returns from its lifespan, or is cancelled."""
        if len(self._sent) > 1:  # it has told that its shutdown is over, and has no more to do than to return
            with real_deadline(_TASK_ENDS):
                await self._until(lambda: self._returned)
        if self._child is not None and not self._returned:
            self._child.cancel()
            with real_deadline(_TASK_ENDS):
                await self._until(lambda: self._returned)

    async def _check(self, phase: str) -> None:
        """Raise what went wrong, if the app has not told that `phase` is complete."""
        last = self._sent[-1] if self._sent else None
        if last is not None and last["type"] == f"lifespan.{phase}.complete" and not self._returned:
            return
        with real_deadline(_TASK_ENDS):
            await self._until(lambda: self._returned)  # its own exception tells more than its message
        error, self._error = self._error, None
        if error is not None:
            raise error
        if last is None or last["type"] != f"lifespan.{phase}.complete":
            raise RuntimeError(f"the {phase} failed: {last.get('message', '') if last else 'the app returned'}")

    async def _run(self) -> None:
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            # It answers in place of an app that has no lifespan, as Django.
            await lifespan.chain(
                self._app,
                scope,
                self._receive,
                _Connection(self, self._send).send,
                startup=_nothing,
                shutdown=_nothing,
                strict=False,
            )
        except Exception as exc:
            self._error = exc
        finally:
            self._returned = True
            self._notify()

    async def _receive(self) -> Message:
        if not self._sent:
            return {"type": "lifespan.startup"}
        while not self._asked:
            await self._changed.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        self._sent.append(message)
        self._notify()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


class _Connection:
    """Whose ``send`` a request, or the lifespan, of a server is."""

    def __init__(self, server: RunningApp, send: Send) -> None:
        self.config = server
        self._send = send

    async def send(self, message: Message) -> None:
        await self._send(message)


async def _nothing() -> None:
    """Nothing of ours happens at the start-up, and at the shutdown."""


@asynccontextmanager
async def running(app: ASGIApp, *, timeout: float = 15.0) -> AsyncIterator[RunningApp]:
    """Run the lifespan of `app` around a block, in which streams can be opened on it.

    An app that has no lifespan, as Django, has none. Servers in one event loop do not end each other's streams.

    Args:
        app: Any ASGI app.
        timeout: Seconds of real time for the start-up, and as of `RunningApp.stop`.

    Yields:
        The app to send requests to.

    Raises:
        TypeError: `app` is none.
        RuntimeError: The start-up or the shutdown failed.
        TimeoutError: It did not complete.
        AssertionError: At the end a response goes on, which would hold a server.
        Exception: What the app raised in its start-up or shutdown.
    """
    if not callable(app):
        raise TypeError(f"app={short_repr(app)} is not an ASGI app; give what a server is given")
    server = RunningApp(app)
    try:
        await server.start(timeout)
        try:
            yield server
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                try:
                    await server.stop(timeout)
                except Exception as exc:
                    error.add_note(f"And on stopping the app: {type(exc).__name__}: {exc}")
            raise
        with anyio.CancelScope(shield=True):
            await server.stop(timeout)
    finally:
        with anyio.CancelScope(shield=True):
            await server.leave()
