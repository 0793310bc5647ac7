"""A response body as an async iterator, for frameworks that send the response start and then ask for chunks."""

from __future__ import annotations

import contextvars
import logging
from typing import TYPE_CHECKING, Final

import anyio

from asgi_sse.errors import printable
from asgi_sse.runtime.condition import ChangeNotifier
from asgi_sse.runtime.current import current_loop
from asgi_sse.stream.response import RESPONDER_KEY, current_scope

if TYPE_CHECKING:
    from asgi_sse.protocol.asgi import Message, Scope
    from asgi_sse.runtime.base import EventLoop
    from asgi_sse.stream.response import EventSourceResponse

logger: Final = logging.getLogger(__name__)


class Body(ChangeNotifier):
    """Runs a response in a task of its own and yields the chunks of its body.

    The ``send`` of that response waits until the framework asks for the next chunk, which is when the framework's own
    send of the previous one has ended. A slow client therefore delays the stream, and a stuck one is detected, as if
    there were no framework in between.

    Args:
        response: The response. Its response start is dropped, because the framework sends one.
        scope: The request's scope. Default: the scope that the middleware remembered, if any.
        context: The context in which the source runs. Default: a copy of the context of the first ``__anext__``.
    """

    __slots__ = ("_chunk", "_context", "_disconnected", "_ended", "_error", "_loop", "_response", "_scope", "_wanted")

    def __init__(
        self, response: EventSourceResponse, scope: Scope | None = None, context: contextvars.Context | None = None
    ) -> None:
        super().__init__()
        self._response = response
        self._scope = current_scope.get() if scope is None else scope
        if self._scope is not None and RESPONDER_KEY in self._scope:
            self._scope[RESPONDER_KEY].disable_adoption()  # before the framework sends the response start
        self._context = context
        self._loop: EventLoop | None = None
        self._chunk: bytes | None = None
        self._wanted = False
        self._disconnected = False
        self._ended = False
        self._error: BaseException | None = None

    def set_scope(self, scope: Scope) -> None:
        """Set the request's scope, for a framework that reveals it only after the body was made."""
        self._scope = scope

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        if self._loop is None:
            self._loop = current_loop()
            (self._context or contextvars.copy_context()).run(self._loop.spawn, self._run, "asgi_sse body")
        self._wanted = True
        self.notify_changed()
        try:
            while self._chunk is None:
                if self._ended:
                    self._raise_error()
                    raise StopAsyncIteration
                await self.wait_changed()
        except GeneratorExit:  # the event loop was closed under this task
            raise
        except anyio.get_cancelled_exc_class():
            self._disconnect()  # a cancelled framework does not ask for another chunk
            raise
        chunk, self._chunk = self._chunk, None
        return chunk

    async def aclose(self) -> None:
        """End the stream and wait until its source has cleaned up."""
        self._disconnect()
        with anyio.CancelScope(shield=True):
            while self._loop is not None and not self._ended:
                await self.wait_changed()

    def close(self) -> None:
        """End the stream without waiting. Safe to call from any thread."""
        if self._loop is not None:
            self._loop.call_threadsafe(self._disconnect)

    def _disconnect(self) -> None:
        self._disconnected = True
        self.notify_changed()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame, so the frame must not hold the error

    async def _run(self) -> None:
        scope: Scope = self._scope or {"type": "http", "method": "GET", "path": "", "headers": []}
        try:
            await self._response(scope, self._receive, self._send)
        except GeneratorExit:  # the event loop was closed under this task
            raise
        except BaseException as exc:
            if self._disconnected and isinstance(exc, anyio.get_cancelled_exc_class()):
                pass  # the event loop is ending
            elif self._disconnected:  # no later __anext__ could raise the error
                path = printable(scope["path"])
                logger.exception("the source of %s raised after its client had left", path, extra={"sse_path": path})
            else:
                self._error = exc
        finally:
            self._ended = True
            self.notify_changed()

    async def _receive(self) -> Message:
        while not self._disconnected:
            await self.wait_changed()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        body = message.get("body")
        if not body:
            return
        if self._disconnected:
            return
        self._chunk = bytes(body)
        self._wanted = False
        self.notify_changed()
        while not (self._wanted or self._disconnected):
            await self.wait_changed()
