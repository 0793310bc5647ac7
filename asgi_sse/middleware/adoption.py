"""Adoption: which event streams of an app the middleware takes over, and `AdoptedStream`, which runs them.

The bytes of the app stay as they are. The stream gains keep-alive comments between its events, headers that keep
proxies from buffering it, a send timeout, and an end when the server stops. An app that only sends learns of a
disconnect.
"""

from collections import deque
from enum import Enum, auto
from typing import Final

import anyio
import anyio.lowlevel

from asgi_sse.protocol.asgi import Message, Receive, Scope, Send
from asgi_sse.protocol.headers import EVENT_STREAM_HEADERS
from asgi_sse.runtime.base import Child, Wait
from asgi_sse.runtime.compressors import encoding_of
from asgi_sse.runtime.condition import ChangeNotifier
from asgi_sse.runtime.server import Server
from asgi_sse.stream.draining import DrainingEvent
from asgi_sse.stream.options import StreamOptions
from asgi_sse.stream.registry import StreamRegistry
from asgi_sse.stream.stream import Stream

DISCONNECT_GRACE_S: Final = 0.5
"""Seconds that an app has to read its disconnect from ``receive()`` before it is cancelled."""

_READ_AHEAD_BYTES: Final = 65_536
"""Bytes of the request body that are read before the app asks for them, to find the disconnect that follows."""

_FILE_MESSAGES: Final = ("http.response.pathsend", "http.response.zerocopysend")


class ResponseKind(Enum):
    """What the start of a response says about adoption."""

    OTHER = auto()
    """Not an event stream: it has another content type, or a status other than 200, where clients expect no events."""

    COMPRESSED = auto()
    """An event stream with a content coding, into which no comment can be inserted."""

    BOUNDED = auto()
    """An event stream without an open end: an answer to HEAD, a part, or one with a length or trailers."""

    ADOPTABLE = auto()
    """An event stream that continues in body messages. If a file message follows, `AdoptedStream` lets it pass."""


def classify(scope: Scope, start: Message) -> ResponseKind:
    """Return what kind of response begins with `start`. Only a stream that is ``ADOPTABLE`` may be adopted."""
    if start["status"] != 200:
        return ResponseKind.OTHER
    headers = start.get("headers", ())
    for name, value in headers:
        if name.lower() == b"content-type":
            if value[:17].lower() != b"text/event-stream":
                return ResponseKind.OTHER
            break
    else:
        return ResponseKind.OTHER
    if encoding_of(headers):
        return ResponseKind.COMPRESSED
    names = {name.lower() for name, _ in headers}
    if scope["method"] == "HEAD" or start.get("trailers", False) or names & {b"content-length", b"content-range"}:
        return ResponseKind.BOUNDED
    return ResponseKind.ADOPTABLE


class IncompleteBodyError(Exception):
    """The app returned before the end of its body. It stands for the error that the server reports."""


class AdoptedStream(ChangeNotifier, Child):
    """Runs the app's response as a `Stream`, with the app's task as its source.

    The app continues in the request's task, so that errors and backpressure of its sends reach it there. The stream
    runs in a task of its own.

    Args:
        scope: The scope of the request.
        start: The app's response start.
        receive: The server's ``receive``.
        receiving: Whether the app is waiting in ``receive`` now.
        send: The server's ``send``.
        connection: The ``send`` outside every middleware, which leads to the connection.
        server: The server.
        registry: The registry that the stream runs in.
        options: The options of the stream.
        wait: The wait around the app, which cancels it.

    Attributes:
        start: The response start that is sent: the app's, with the headers that it lacks.
        disconnected: Whether the client has left.
        reading: Always false: the app's uploads do not delay the response start.
    """

    __slots__ = (
        "_ahead_bytes", "_app_done", "_app_start", "_discard", "_disconnect_delivered", "_error", "_messages",
        "_passed_through", "_raised", "_receive", "_receiving", "_send", "_sending", "_started", "_stopping", "_stream",
        "_stream_done", "_wait", "disconnected", "reading", "start",
    )  # fmt: skip

    disconnected: bool

    def __init__(
        self,
        scope: Scope,
        start: Message,
        *,
        receive: Receive,
        receiving: bool,
        send: Send,
        connection: Send,
        server: Server,
        registry: StreamRegistry,
        options: StreamOptions,
        wait: Wait,
    ) -> None:
        super().__init__()
        self._app_start = start
        self._receive = receive
        self._receiving = receiving
        self._send = send
        self._wait = wait
        self._messages: deque[Message] = deque()  # received, but not yet requested by the app
        self._ahead_bytes = 0  # in these messages
        self.disconnected = False
        self.reading: bool = False
        self._disconnect_delivered = False  # the app has received http.disconnect
        self._stopping = False  # the stream is ending, and what the app still sends is dropped
        self._sending = anyio.Lock(fast_acquire=True)  # does not yield, so that a burst of events leaves as one message
        self._started = False
        self._passed_through = False
        self._app_done = False
        self._discard = False  # the app sends a second response, which goes nowhere
        self._stream_done = anyio.Event()
        self._error: BaseException | None = None  # to be raised in the app
        self._raised: BaseException | None = None
        given = {name.lower() for name, _ in start.get("headers", ())}
        missing = [pair for pair in EVENT_STREAM_HEADERS if pair[0] not in given]
        self.start: Message = {**start, "headers": [*start.get("headers", ()), *missing]}
        self._stream = Stream(
            None,
            head=self.start,
            path=scope["path"],
            client=scope.get("client"),
            receiver=self,
            send=send,
            connection=connection,
            server=server,
            options=options,
            host=registry,
            draining=DrainingEvent(),
            child=self,
        )
        server.loop.spawn(self._run, "asgi_sse adopted stream")

    async def _run(self) -> None:
        # This begins in the next turn. A file message after the response start may have ended the adoption by then.
        if self._passed_through:
            return
        self._started = True
        try:
            await self._stream.run()
        except BaseException as exc:  # raised in the app's task instead
            self._keep_error(exc)
        finally:
            self._stream_done.set()
            self.notify_changed()

    # Called by the app

    async def receive(self) -> Message:
        """Receive for the app. `watch` reads from the server, so that a drain can wake the app here."""
        while not self._messages:
            if self.disconnected or self._stopping:
                self._disconnect_delivered = True
                self._release_app()
                return {"type": "http.disconnect"}
            if self._stream_done.is_set():
                return await self._receive()
            await self.wait_changed()
        message = self._messages.popleft()
        self._ahead_bytes -= len(message.get("body", b""))
        self.notify_changed()
        return message

    async def send(self, message: Message) -> None:
        """Send for the app, and return when the buffer has room for more.

        Raises:
            Exception: The error that the server's ``send`` raised.
        """
        if message["type"] in _FILE_MESSAGES:
            await self._pass_through()
        if message["type"] == "http.response.start" and (self._app_done or self._stopping):
            # The body has ended, perhaps because we ended it. An app that then answers with an error has no client.
            self._discard = True
        if self._discard:
            await anyio.lowlevel.checkpoint()
            return
        if self._passed_through or message["type"] != "http.response.body":
            await self._send(message)
            return
        async with self._sending:
            body = message.get("body", b"")
            if body and self._stream.reason is None and self._stream.buffer.push(bytes(body)):
                await self._stream.buffer.room()
            if self._stopping:
                self._raise_error()
                await anyio.lowlevel.checkpoint()  # an app that only sends must not starve the task that cancels it
            elif not message.get("more_body", False):
                self._app_done = True
                self._stream.end_source()
                await self._stream_done.wait()
                self._raise_error()

    async def finish(self, error: BaseException | None) -> None:
        """End the stream, because the app has returned or raised `error`, and wait until it has ended.

        Raises:
            Exception: The error that the server's ``send`` raised.
        """
        complete, self._app_done = self._app_done, True
        if self._passed_through:
            return
        cancelled = error is not None and not isinstance(error, Exception)
        if cancelled:
            self._stream.end_source(error)
        else:
            self._stream.end_source(None if complete or self._stopping else error or IncompleteBodyError())
        with anyio.CancelScope(shield=True):
            await self._stream_done.wait()
        if error is None:
            self._raise_error()

    async def _pass_through(self) -> None:
        """Undo the adoption, since the server sends a file."""
        if not self._passed_through:
            self._passed_through = True
            if self._started:
                self._stream.end_source(IncompleteBodyError())  # the file is the rest of the body
                await self._stream_done.wait()
            else:
                await self._send(self._app_start)

    def _keep_error(self, error: BaseException | None) -> None:
        """Keep an error of the stream for the app, unless it came from there."""
        if error is not None and error is not self._raised and not isinstance(error, IncompleteBodyError):
            self._error = error

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._raised = error  # raised once: the app may handle it
            raise error

    # Called by the stream (`stream.DisconnectWatcher`)

    async def watch(self) -> None:
        """Return when the client has left. Reads ahead of the app, which may not have read its request body."""
        while not self.disconnected:
            if self._receiving or self._ahead_bytes > _READ_AHEAD_BYTES:
                await self.wait_changed()
                continue
            self._receiving = True
            try:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    self.disconnected = True
                else:
                    self._ahead_bytes += len(message.get("body", b""))
                    self._messages.append(message)
            finally:
                self._receiving = False
                self.notify_changed()

    def discard(self) -> None:
        """Keep the request body, which the app may still read."""

    def received(self, message: Message | None) -> None:
        """Note the end of an app's ``receive()`` that began before the adoption; ``None`` if it raised."""
        self._receiving = False
        if message is not None and message["type"] == "http.disconnect":
            self.disconnected = self._disconnect_delivered = True
            self._release_app()
        self.notify_changed()

    # The app's task, as the stream's source (`base.Child`)

    def cancel(self) -> None:
        """Let the app receive a disconnect. It is cancelled if it does not ask for one."""
        self._stopping = True
        self._keep_error(self._stream.send_error)
        self.notify_changed()
        self._stream.buffer.release()
        loop = self._stream.loop
        loop.call_at(loop.time() + DISCONNECT_GRACE_S, self._cancel_app)
        self._release_app()

    def _release_app(self) -> None:
        """End the stream once the app knows. It may then clean up for as long as it takes without the middleware."""
        if self._disconnect_delivered and self._stopping:
            self._stream.end_source()

    def _cancel_app(self) -> None:
        if not (self._disconnect_delivered or self._app_done):
            self._wait.cancel()

    def shield(self) -> None:
        """Do nothing: the app decides how it cleans up."""

    @property
    def cancelled(self) -> bool:
        """Always false: a cancellation that leaves the app is its own."""
        return False

    @property
    def running(self) -> bool:
        """Always false: no code of ours runs as a step of the app's task."""
        return False

    def force_cancel(self) -> None:
        """Cancel the app, even in its clean-up."""
        if not self._app_done:
            self._wait.cancel(again=True)
