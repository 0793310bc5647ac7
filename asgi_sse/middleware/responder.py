"""`Responder`: one request on its way through the app inside the middleware, and its response on the way back."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import anyio.lowlevel

from asgi_sse.protocol.asgi import ASGIApp, Message, Receive, Scope, Send
from asgi_sse.routing.endpoint import send_text
from asgi_sse.routing.request import HTTPError
from asgi_sse.runtime.compressors import CHECK_AFTER_S, CompressorGuard, check_headers_later, encoding_of
from asgi_sse.runtime.current import current_loop
from asgi_sse.runtime.server import Server, server_of
from asgi_sse.stream.options import StreamOptions
from asgi_sse.stream.registry import StreamRegistry
from asgi_sse.stream.response import RESPONDER_KEY, current_scope
from asgi_sse.stream.stream import Stream

from .adoption import DISCONNECT_GRACE_S, AdoptedStream, ResponseKind, classify


@dataclass(slots=True)
class ResponderConfig:
    """The settings of a middleware that apply to each of its requests.

    Attributes:
        registry: The registry that adopted streams run in.
        options: The options of adopted streams; ``None`` turns adoption off.
        watch: Whether to watch the server for its shutdown.
        guard: The policy about compressors; ``None`` to ignore them.
    """

    registry: StreamRegistry
    options: StreamOptions | None
    watch: bool
    guard: CompressorGuard | None


class Responder:
    """Wraps the ``receive`` and ``send`` of one request.

    An event stream that the app sends by itself is adopted. For a stream of this library that runs inside the app, the
    responder compares what the stream has sent with what has left the app, and so detects a middleware that holds it
    back.

    Args:
        scope: The scope of the request.
        receive: The server's ``receive``.
        send: The server's ``send``.
        config: The settings of the middleware.

    Attributes:
        connection: The ``send`` outside every middleware. Inside one such as Starlette's BaseHTTPMiddleware, ``send``
            does not lead to the connection.
    """

    __slots__ = (
        "_adopted",
        "_body_left",
        "_config",
        "_discard",
        "_outer",
        "_own_stream",
        "_receive",
        "_receiving",
        "_refused",
        "_scope",
        "_send",
        "_start_left",
        "_stream",
        "_wait",
        "connection",
    )  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, send: Send, config: ResponderConfig) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._config = config
        self._outer: Responder | None = scope.get(RESPONDER_KEY)
        self.connection: Send = send if self._outer is None else self._outer.connection
        self._wait = current_loop().wait()
        self._own_stream = False  # the response is, or will be, a stream of this library
        self._stream: Stream | None = None
        self._discard = False  # the app sends a second response, which goes nowhere
        self._adopted: AdoptedStream | None = None
        self._receiving = False
        self._refused = False
        self._start_left = False
        self._body_left = False

    @property
    def server(self) -> Server:
        """The server of the request."""
        return server_of(self.connection)

    async def run(self, app: ASGIApp) -> None:
        """Call `app`.

        Raises:
            Exception: The error that `app`, or the server's ``send``, raised.
        """
        # The scope is changed in place and restored at the end. With a copy, a middleware around us would not see what
        # the app adds to the scope, such as its route.
        scope = self._scope
        headers = scope["headers"]
        scope[RESPONDER_KEY] = self
        if self._config.guard is not None and self._config.guard.bypass:
            scope["headers"] = _without_accept_encoding(headers)
        error: BaseException | None = None
        token = current_scope.set(scope)
        try:
            with self._wait:
                await app(scope, self.receive, self.send)
        except BaseException as exc:
            error = exc
            # A refused app fails because its stream has no client any more.
            if not (self._refused and isinstance(exc, Exception)):
                raise
        finally:
            try:
                if self._adopted is not None:
                    await self._adopted.finish(error)
            finally:
                del error  # the traceback holds this frame, which would hold the error
                current_scope.reset(token)
                scope["headers"] = headers
                scope[RESPONDER_KEY] = self._outer

    # Called by the app

    async def receive(self) -> Message:
        """Receive for the app."""
        if self._refused:
            return {"type": "http.disconnect"}
        if self._adopted is not None:
            return await self._adopted.receive()
        self._receiving = True
        try:
            message = await self._receive()
        except BaseException:
            self._received(None)
            raise
        self._received(message)
        return message

    def _received(self, message: Message | None) -> None:
        self._receiving = False
        if self._adopted is not None:  # the stream was adopted while the app waited
            self._adopted.received(message)

    async def send(self, message: Message) -> None:
        """Send for the app."""
        if self._adopted is not None:
            await self._adopted.send(message)
            return
        if message["type"] == "http.response.start" and self._start_left:
            # An app such as MCP's SDK may run our stream to its end, and then send a response of its own.
            self._discard = self._stream is not None and self._stream.reason is not None
        if self._refused or self._discard:
            await anyio.lowlevel.checkpoint()  # an app that only sends must let other tasks run
            return
        if message["type"] == "http.response.start":
            if not isinstance(message.get("headers", ()), list | tuple):  # ASGI allows an iterator, which is read once
                message = {**message, "headers": list(message["headers"])}
            if await self._take_over(message):
                return
            self._start_left = True
        elif message["type"] == "http.response.body":
            self._body_left = True
        await self._send(message)

    async def _take_over(self, start: Message) -> bool:
        """Adopt or refuse an event stream; return False if the response is sent as it is."""
        kind = classify(self._scope, start)
        if kind is ResponseKind.OTHER:
            return False
        if kind is ResponseKind.COMPRESSED:
            return await self._report_compressed(encoding_of(start.get("headers", ())))
        options = self._config.options
        if kind is ResponseKind.ADOPTABLE and options is not None and not self._own_stream:
            self._adopt(start, options)
            return True
        self._check_start_later(start)
        return False

    async def _report_compressed(self, encoding: str) -> bool:
        """Report a compressed event stream; return whether it was refused."""
        guard = self._config.guard
        if guard is None:
            return False
        guard.report("encoded", self._scope["path"], encoding)
        if not guard.refuse:
            return False
        self._refused = True
        loop = current_loop()
        loop.call_at(loop.time() + DISCONNECT_GRACE_S, self._wait.cancel)
        await send_text(self._scope, self._send, HTTPError(500, guard.refusal(encoding)))
        return True

    def _check_start_later(self, start: Message) -> None:
        if self._config.guard is not None and isinstance(start.get("headers"), list):
            count = self._config.registry.count_compressed
            check_headers_later(start["headers"], self._send, self.server.loop, self._scope["path"], count)

    def _adopt(self, start: Message, options: StreamOptions) -> None:
        if self._config.watch:
            self._config.registry.watch(self.server)
        self.disable_adoption()
        self._adopted = AdoptedStream(
            self._scope,
            start,
            receive=self._receive,
            receiving=self._receiving,
            send=self._send,
            connection=self.connection,
            server=self.server,
            registry=self._config.registry,
            options=options,
            wait=self._wait,
        )
        self._check_start_later(self._adopted.start)

    # Called by a stream of this library that answers the request

    def watch_stream(self, stream: Stream) -> None:
        """Check soon whether `stream`, which answers this request, leaves the app without delay."""
        self._stream = stream
        self.disable_adoption()
        loop = stream.loop
        loop.call_at(loop.time() + CHECK_AFTER_S, partial(self._compare, stream))

    def disable_adoption(self) -> None:
        """Adopt no stream, here and in each middleware around this one: the response is a stream of this library."""
        self._own_stream = True
        if self._outer is not None:
            self._outer.disable_adoption()

    def _compare(self, stream: Stream) -> None:
        guard = self._config.guard
        if guard is None or self._refused or stream.reason is not None or not stream.opened:
            return
        if stream.bytes_sent and not self._body_left:
            guard.report("buffered", self._scope["path"])
        elif not self._start_left:
            guard.report("held", self._scope["path"])


def _without_accept_encoding(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    """Return `headers` without ``Accept-Encoding`` if the client accepts event streams, else unchanged."""
    for name, value in headers:
        if name == b"accept" and b"text/event-stream" in value:
            return [pair for pair in headers if pair[0] != b"accept-encoding"]
    return headers
