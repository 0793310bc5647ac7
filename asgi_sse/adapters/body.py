"""The body of a response as an iterator, for frameworks that send the head themselves and then ask for chunks."""

from __future__ import annotations

import contextvars
import logging
from typing import TYPE_CHECKING

import anyio

from asgi_sse.errors import printable
from asgi_sse.runtime.current import current_loop
from asgi_sse.stream.receiver import Changing
from asgi_sse.stream.response import RESPONDER_KEY, current_scope

if TYPE_CHECKING:
    from asgi_sse.protocol.asgi import Message, Scope
    from asgi_sse.runtime.base import EventLoop
    from asgi_sse.stream.response import EventSourceResponse

logger = logging.getLogger(__name__)


class Body(Changing):
    """Runs a response, and gives what it sends, one chunk at a time.

    Its ``send`` waits until the next chunk is asked for, which is when the framework's own send of this one has
    ended: so a slow client holds the stream up, and a stuck one is found, as if there were no framework between.

    Args:
        response: The response. Its head is dropped.
        scope: The request's scope, if it is known.
        context: In which its source runs. ``None``: that in which the first chunk is asked for.
    """

    __slots__ = ("_chunk", "_context", "_disconnected", "_ended", "_error", "_loop", "_response", "_scope", "_wanted")

    def __init__(
        self, response: EventSourceResponse, scope: Scope | None = None, context: contextvars.Context | None = None
    ) -> None:
        super().__init__()
        self._response = response
        self._scope = current_scope.get() if scope is None else scope
        if self._scope is not None and RESPONDER_KEY in self._scope:
            self._scope[RESPONDER_KEY].disable_adoption()  # before the framework sends its head
        self._context = context
        self._loop: EventLoop | None = None
        self._chunk: bytes | None = None
        self._wanted = False
        self._disconnected = False
        self._ended = False
        self._error: BaseException | None = None

    def begin(self, scope: Scope) -> None:
        """The request is known now."""
        self._scope = scope

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        if self._loop is None:
            self._loop = current_loop()
            (self._context or contextvars.copy_context()).run(self._loop.spawn, self._run, "asgi_sse body")
        self._wanted = True
        self._notify()
        try:
            while self._chunk is None:
                if self._ended:
                    self._raise_error()
                    raise StopAsyncIteration
                await self._change()
        except GeneratorExit:  # its event loop was closed under it
            raise
        except anyio.get_cancelled_exc_class():
            self._leave()  # who is cancelled here does not ask again
            raise
        chunk, self._chunk = self._chunk, None
        return chunk

    async def aclose(self) -> None:
        """The client has left, or wants no more: end the stream, and wait until its source is cleaned up."""
        self._leave()
        with anyio.CancelScope(shield=True):
            while self._loop is not None and not self._ended:
                await self._change()

    def close(self) -> None:
        """As `aclose`, without waiting; from any thread."""
        if self._loop is not None:
            self._loop.call_threadsafe(self._leave)

    def _leave(self) -> None:
        self._disconnected = True
        self._notify()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or its traceback would hold this frame, and this frame it

    async def _run(self) -> None:
        scope: Scope = self._scope or {"type": "http", "method": "GET", "path": "", "headers": []}
        try:
            await self._response(scope, self._receive, self._send)
        except GeneratorExit:  # as above
            raise
        except BaseException as exc:
            if self._disconnected and isinstance(exc, anyio.get_cancelled_exc_class()):
                pass  # the event loop ends
            elif self._disconnected:  # then nobody asks for a chunk any more, and would get it
                path = printable(scope["path"])
                logger.exception("the source of %s raised when its client had left", path, extra={"sse_path": path})
            else:
                self._error = exc
        finally:
            self._ended = True
            self._notify()

    async def _receive(self) -> Message:
        while not self._disconnected:
            await self._change()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        body = message.get("body")
        if not body:
            return
        while not (self._wanted or self._disconnected):
            await self._change()
        if self._disconnected:
            return
        self._chunk = bytes(body)
        self._wanted = False
        self._notify()
        while not (self._wanted or self._disconnected):
            await self._change()
