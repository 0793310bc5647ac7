"""One request on its way through the app around which we are, and its response on the way back."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import anyio.lowlevel

from asgi_sse.protocol.asgi import ASGIApp, Message, Receive, Scope, Send
from asgi_sse.routing.endpoint import send_text
from asgi_sse.routing.request import HTTPError
from asgi_sse.runtime.compressors import CHECK_AFTER_S, Guard, check_headers_later, encoding_of
from asgi_sse.runtime.current import current_loop
from asgi_sse.runtime.server import Server, server_of
from asgi_sse.stream.options import StreamOptions
from asgi_sse.stream.registry import StreamRegistry
from asgi_sse.stream.response import RESPONDER_KEY, current_scope
from asgi_sse.stream.stream import Stream

from .adoption import PATIENCE, AdoptedStream, may_be_adopted


@dataclass(slots=True)
class ResponderConfig:
    """What holds for every request through one app.

    Attributes:
        registry: Where streams that are adopted run.
        options: How they behave; ``None``: none is adopted.
        watch: Whether to watch the server's shutdown.
        guard: What is done about compression; ``None``: nothing.
    """

    registry: StreamRegistry
    options: StreamOptions | None
    watch: bool
    guard: Guard | None


class Responder:
    """Passes the messages on, and looks what kind of response they make.

    An event stream of the app's own is adopted; one of this library's, which runs inside of the app, is
    compared: what it has sent with what has left the app.
    """

    __slots__ = (
        "_adopted",
        "_answers_again",
        "_body_left",
        "_config",
        "_ours",
        "_outer",
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
        # As it is outside of every middleware: inside of one such as Starlette's BaseHTTPMiddleware, ``send`` leads
        # nowhere.
        self.connection: Send = send if self._outer is None else self._outer.connection
        self._wait = current_loop().wait()
        self._ours = False
        self._stream: Stream | None = None
        self._answers_again = False
        self._adopted: AdoptedStream | None = None
        self._receiving = False
        self._refused = False
        self._start_left = False
        self._body_left = False

    @property
    def server(self) -> Server:
        """The server that the request came through."""
        return server_of(self.connection)

    async def run(self, app: ASGIApp) -> None:
        """Call `app`.

        Raises:
            Exception: What `app` raised, or what the server's ``send`` did.
        """
        # In the scope itself, and put back at the end: in a copy, who is around us would not see what the app adds to
        # it, such as its route.
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
            if not (self._refused and isinstance(exc, Exception)):  # else it fails since nobody listens any more
                raise
        finally:
            try:
                if self._adopted is not None:
                    await self._adopted.finish(error)
            finally:
                del error  # its traceback holds this frame
                current_scope.reset(token)
                scope["headers"] = headers
                scope[RESPONDER_KEY] = self._outer

    # The app's side

    async def receive(self) -> Message:
        """The app's ``receive()``."""
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
        if self._adopted is not None:  # since then
            self._adopted.received(message)

    async def send(self, message: Message) -> None:
        """The app's ``send()``."""
        if self._adopted is not None:
            await self._adopted.send(message)
            return
        if message["type"] == "http.response.start" and self._start_left:
            # One that has run our stream to its end may have a response left, as MCP's SDK has: the stream was it.
            self._answers_again = self._stream is not None and self._stream.reason is not None
        if self._refused or self._answers_again:
            await anyio.lowlevel.checkpoint()  # an app that only sends must let others run
            return
        if message["type"] == "http.response.start":
            if not isinstance(message.get("headers", ()), list | tuple):  # ASGI allows any iterable, to be read once
                message = {**message, "headers": list(message["headers"])}
            if _is_event_stream(message) and await self._meet(message):
                return
            self._start_left = True
        elif message["type"] == "http.response.body":
            self._body_left = True
        await self._send(message)

    async def _meet(self, start: Message) -> bool:
        """Look at the head of an event stream. True: it is dealt with."""
        headers = {name.lower(): value for name, value in start.get("headers", ())}
        guard = self._config.guard
        encoding = encoding_of(headers.items())
        if encoding:
            if guard is not None:
                guard.report("encoded", self._scope["path"], encoding)
                if guard.refuse:
                    await self._refuse(guard.refusal(encoding))
                    return True
            return False
        if self._ours or self._config.options is None or not may_be_adopted(self._scope, start, headers):
            self._watch_head(start)
            return False
        self._adopt(start, headers, self._config.options)
        return True

    def _watch_head(self, start: Message) -> None:
        if self._config.guard is not None and isinstance(start.get("headers"), list):
            count = self._config.registry.count_compressed
            check_headers_later(start["headers"], self._send, self.server.loop, self._scope["path"], count)

    async def _refuse(self, reason: str) -> None:
        self._refused = True
        loop = current_loop()
        loop.call_at(loop.time() + PATIENCE, self._wait.cancel)
        await send_text(self._scope, self._send, HTTPError(500, reason))

    def _adopt(self, start: Message, headers: dict[bytes, bytes], options: StreamOptions) -> None:
        if self._config.watch:
            self._config.registry.watch(self.server)
        self.belongs_to_us()
        self._adopted = AdoptedStream(
            self._scope,
            start,
            headers,
            receive=self._receive,
            busy=self._receiving,
            send=self._send,
            connection=self.connection,
            server=self.server,
            registry=self._config.registry,
            options=options,
            wait=self._wait,
        )
        self._watch_head(self._adopted.head)

    # The side of a stream of our own

    def carries(self, stream: Stream) -> None:
        """`stream` is the response to this request, and sends it through the app's middlewares."""
        self._stream = stream
        self.belongs_to_us()
        loop = stream.loop
        loop.call_at(loop.time() + CHECK_AFTER_S, partial(self._compare, stream))

    def belongs_to_us(self) -> None:
        """The response is a stream of ours, or will be: it is not to be adopted."""
        self._ours = True
        if self._outer is not None:  # of a wrapper around the one that has it
            self._outer.belongs_to_us()

    def _compare(self, stream: Stream) -> None:
        guard = self._config.guard
        if guard is None or self._refused or stream.reason is not None or not stream.opened:
            return
        if stream.bytes_sent and not self._body_left:
            guard.report("buffered", self._scope["path"])
        elif not self._start_left:
            guard.report("held", self._scope["path"])


def _is_event_stream(start: Message) -> bool:
    if start["status"] != 200:  # a client does not read events from it
        return False
    for name, value in start.get("headers", ()):
        if name.lower() == b"content-type":
            return bool(value[:17].lower() == b"text/event-stream")
    return False


def _without_accept_encoding(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    """The headers of a client that asks for events, as if it knew no compression; those of any other as they are."""
    for name, value in headers:
        if name == b"accept" and b"text/event-stream" in value:
            return [pair for pair in headers if pair[0] != b"accept-encoding"]
    return headers
