"""`running`: an app between its start-up and its shutdown, as a server runs it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio

from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import ASGIApp, Message, Receive, Scope, Send
from asgi_sse.runtime import lifespan
from asgi_sse.runtime.shutdown import ShutdownHook

from .app_task import DEFAULT_TIMEOUT_S, AppTask, check_app
from .clock import real_deadline

_RETURN_TIMEOUT_S: Final = 1.0
"""Seconds of real time that an app has to return from its lifespan, or to raise, after its last message."""


class RunningApp:
    """An app that has started up. `running` makes it.

    It is an ASGI app itself: pass it to `open_stream` and `StreamingASGITransport` in place of the app.

    Attributes:
        state: What the app put into the lifespan state. Each request gets a copy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._requests: list[Scope] = []
        self._lifespan = AppTask()
        self._answers: list[Message] = []  # of the lifespan: to the start-up, then to the shutdown
        self._shutdown_sent = False
        self._stopping = False
        self._stopped = False
        # `server_of` finds these two through each send, and so tells the streams of two servers apart.
        self.config = self
        self.shutdown_hook: ShutdownHook = ShutdownHook()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection.

        Raises:
            RuntimeError: The server has stopped.
            Exception: What the app raised.
        """
        if self._stopped:
            raise RuntimeError(
                f"{scope.get('path', '/')}: this server has stopped and accepts no requests; open the stream before "
                "stop(), or enter running() again"
            )
        scope = {**scope, "state": {**self.state, **scope.get("state", {})}}
        self._requests.append(scope)
        try:
            await self._app(scope, receive, _Connection(self, send).send)
        finally:
            self._requests = [other for other in self._requests if other is not scope]
            self._lifespan.notify()

    async def start(self, timeout: float) -> None:
        """Run the start-up of the app.

        Args:
            timeout: Seconds of real time for it.

        Raises:
            TimeoutError: The start-up did not complete in time.
            RuntimeError: The start-up failed.
            Exception: What the app raised.
        """
        self._lifespan.start(self._run_lifespan, "asgi_sse.testing lifespan")
        if not await self._wait_for_answers(1, timeout):
            raise TimeoutError(
                f"the start-up of {short_repr(self._app)} has not completed within {timeout:g} s; give running() a "
                "longer timeout if the app needs it"
            )
        await self._check_answer("startup")

    async def stop(self, timeout: float = DEFAULT_TIMEOUT_S) -> None:
        """Stop like a server after SIGTERM: notify the streams, wait for the responses, run the shutdown of the app.

        Open event streams end as they do when a server stops: properly, at once or within their grace period, and with
        a reconnection time. `running` calls this method at the end of its block. A second call does nothing.

        Args:
            timeout: Seconds of real time for the responses, and again for the shutdown. Default: 15.

        Raises:
            AssertionError: A response goes on. A server would wait for it for ever, or cut it.
            TimeoutError: The shutdown did not complete in time.
            RuntimeError: The shutdown failed.
            Exception: What the app raised in its shutdown.
        """
        if self._stopping:
            return
        self._stopping = True
        self.shutdown_hook.stopping()
        with real_deadline(timeout):
            await self._lifespan.wait_until(lambda: not self._requests)
        unfinished = [f"{scope.get('method', scope['type'])} {scope['path']}" for scope in self._requests]
        self._stopped = True
        self._shutdown_sent = True
        self._lifespan.notify()
        try:
            answered = await self._wait_for_answers(2, timeout)
        finally:
            self.shutdown_hook.stopped()
        if unfinished:
            raise AssertionError(
                f"{', '.join(unfinished)}: still running {timeout:g} s after the server began to stop. A deploy hangs "
                "here: answer with an EventSourceResponse, or wrap the app in SSEMiddleware, which ends its streams"
            )
        if not answered:
            raise TimeoutError(f"the shutdown of {short_repr(self._app)} has not completed within {timeout:g} s")
        await self._check_answer("shutdown")

    async def leave(self) -> None:
        """End the lifespan task: wait a second if the app has shut down, else cancel it."""
        if len(self._answers) > 1:
            await self._lifespan.wait_returned(_RETURN_TIMEOUT_S)
        if not self._lifespan.returned:
            await self._lifespan.cancel()

    async def _wait_for_answers(self, count: int, timeout: float) -> bool:
        def done() -> bool:
            return len(self._answers) >= count or self._lifespan.returned

        with real_deadline(timeout):
            await self._lifespan.wait_until(done)
        return done()

    async def _check_answer(self, phase: str) -> None:
        """Raise if the app has not answered that `phase` is complete."""
        answer = self._answers[-1] if self._answers else None
        complete = answer is not None and answer["type"] == f"lifespan.{phase}.complete"
        if complete and not self._lifespan.returned:
            return
        await self._lifespan.wait_returned(_RETURN_TIMEOUT_S)  # the app's own exception says more than its message
        self._lifespan.raise_error()
        if not complete:
            raise RuntimeError(f"the {phase} failed: {answer.get('message', '') if answer else 'the app returned'}")

    async def _run_lifespan(self) -> None:
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        # `chain` answers for an app that has no lifespan support, such as Django.
        await lifespan.chain(
            self._app,
            scope,
            self._receive,
            _Connection(self, self._send).send,
            startup=_do_nothing,
            shutdown=_do_nothing,
            strict=False,
        )

    async def _receive(self) -> Message:
        if not self._answers:
            return {"type": "lifespan.startup"}
        await self._lifespan.wait_until(lambda: self._shutdown_sent)
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        self._answers.append(message)
        self._lifespan.notify()


class _Connection:
    """The owner of the ``send`` of a request or of the lifespan, by which `server_of` finds its server."""

    def __init__(self, server: RunningApp, send: Send) -> None:
        self.config = server
        self._send = send

    async def send(self, message: Message) -> None:
        await self._send(message)


async def _do_nothing() -> None:
    pass


@asynccontextmanager
async def running(app: ASGIApp, *, timeout: float = DEFAULT_TIMEOUT_S) -> AsyncIterator[RunningApp]:
    """Run the lifespan of `app` around a block in which streams can be opened on it.

    An app without lifespan support, such as Django, may be run as well. Several servers in one event loop do not end
    each other's streams.

    Args:
        app: Any ASGI app.
        timeout: Seconds of real time for the start-up, for the responses at the end, and for the shutdown. Default: 15.

    Yields:
        The app to send requests to.

    Raises:
        TypeError: `app` is not callable.
        RuntimeError: The start-up or the shutdown failed.
        TimeoutError: The start-up or the shutdown did not complete in time.
        AssertionError: A response goes on at the end, which would hold a server.
        Exception: What the app raised in its start-up or shutdown.
    """
    check_app(app)
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
                    error.add_note(f"While stopping the app: {type(exc).__name__}: {exc}")
            raise
        with anyio.CancelScope(shield=True):
            await server.stop(timeout)
    finally:
        with anyio.CancelScope(shield=True):
            await server.leave()
