"""Adopts an event stream that an app sends by itself, and gives it what the app left out.

Its bytes stay as they are. It gains keep-alive comments between its events, headers that keep proxies from
holding it back, a send timeout, a disconnect that reaches an app which only sends, and an end when the
server stops.
"""

from collections import deque
from typing import Final

import anyio
import anyio.lowlevel

from asgi_sse.protocol.asgi import Message, Receive, Scope, Send
from asgi_sse.protocol.headers import EVENT_STREAM_HEADERS
from asgi_sse.runtime.base import Child, Wait
from asgi_sse.runtime.server import Server
from asgi_sse.stream.draining import DrainingEvent
from asgi_sse.stream.options import StreamOptions
from asgi_sse.stream.receiver import Changing
from asgi_sse.stream.registry import StreamRegistry
from asgi_sse.stream.stream import Stream

PATIENCE: Final = 0.5
"""Seconds that an app has to find its disconnect in ``receive()``, before it is cancelled."""

_AHEAD: Final = 65_536
"""Bytes of the request's body read before the app asks, to see the disconnect behind."""

_FILES: Final = ("http.response.pathsend", "http.response.zerocopysend")


class Unfinished(Exception):  # noqa: N818 (nobody sees it: it stands for the error that the server reports)
    """The app returned, and its body had no end."""


def may_be_adopted(scope: Scope, start: Message, headers: dict[bytes, bytes]) -> bool:
    """Whether a 200 with an event stream's type, not encoded, goes on and on in plain body messages."""
    return (
        scope["method"] != "HEAD"
        and not start.get("trailers", False)
        and not {b"content-length", b"content-range"} & headers.keys()
    )


class AdoptedStream(Changing, Child):
    """The app's response as a stream of ours; and the app's task as the stream's source, which is what `Child` means.

    The app goes on in the request's task, so that errors and backpressure of its sends return there; the
    stream runs in a task of its own.

    Args:
        scope: The request's scope.
        start: The app's head.
        headers: Its headers, in lower case.
        receive: The server's ``receive``.
        busy: Whether the app waits in it now.
        send: The server's ``send``.
        connection: The same, by which the connection is found.
        server: The server.
        registry: Where the stream runs.
        options: How it behaves.
        wait: Around the app's task.
    """

    __slots__ = (
        "_ahead", "_answers_again", "_app_done", "_busy", "_closed", "_error", "_messages", "_raised", "_receive",
        "_released", "_send", "_sending", "_start", "_started", "_stream", "_stream_done", "_told", "_wait",
        "disconnected", "head", "reading",
    )  # fmt: skip

    def __init__(
        self,
        scope: Scope,
        start: Message,
        headers: dict[bytes, bytes],
        *,
        receive: Receive,
        busy: bool,
        send: Send,
        connection: Send,
        server: Server,
        registry: StreamRegistry,
        options: StreamOptions,
        wait: Wait,
    ) -> None:
        super().__init__()
        self._start = start
        self._receive = receive
        self._busy = busy
        self._send = send
        self._wait = wait
        self._messages: deque[Message] = deque()  # received, and not asked for yet
        self.disconnected = False
        self.reading = False
        self._ahead = 0  # bytes of them
        self._told = False  # that its client has left, or that the stream is over
        self._closed = False  # the stream is at its end: what the app still sends goes nowhere
        self._sending = anyio.Lock(fast_acquire=True)  # a burst of events shall leave as one
        self._started = False
        self._released = False
        self._app_done = False
        self._answers_again = False
        self._stream_done = anyio.Event()
        self._error: BaseException | None = None  # for the app
        self._raised: BaseException | None = None
        missing = [pair for pair in EVENT_STREAM_HEADERS if pair[0] not in headers]
        self.head: Message = {**start, "headers": [*start.get("headers", ()), *missing]}
        self._stream = Stream(
            None,
            head=self.head,
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
        # Begins in the next turn: the message behind the head may show that it is no stream.
        if self._released:
            return
        self._started = True
        try:
            await self._stream.run()
        except BaseException as exc:  # for the app's task to raise
            self._failed(exc)
        finally:
            self._stream_done.set()
            self._notify()

    # The app's side

    async def receive(self) -> Message:
        """The app's ``receive()``. The stream's watch does the reading, so that a drain can wake the app here."""
        while not self._messages:
            if self.disconnected or self._closed:
                self._told = True
                self._let_go()
                return {"type": "http.disconnect"}
            if self._stream_done.is_set():
                return await self._receive()
            await self._change()
        message = self._messages.popleft()
        self._ahead -= len(message.get("body", b""))
        self._notify()
        return message

    async def send(self, message: Message) -> None:
        """The app's ``send()``: returns when there is room for more.

        Raises:
            Exception: What the server's ``send`` raised.
        """
        if message["type"] in _FILES:
            await self._release()
        if message["type"] == "http.response.start" and (self._app_done or self._closed):
            # The body is over, perhaps by us: an app that answers once more, with an error say, finds nobody.
            self._answers_again = True
        if self._answers_again:
            await anyio.lowlevel.checkpoint()
            return
        if self._released or message["type"] != "http.response.body":
            await self._send(message)
            return
        async with self._sending:
            body = message.get("body", b"")
            if body:
                await self._stream.push(bytes(body))
            if self._closed:
                self._raise_error()
                await anyio.lowlevel.checkpoint()  # an app that only sends must not starve what is to cancel it
            elif not message.get("more_body", False):
                self._app_done = True
                self._stream.end()
                await self._stream_done.wait()
                self._raise_error()

    async def finish(self, error: BaseException | None) -> None:
        """The app has returned, or raised: wait until the stream is over.

        Raises:
            Exception: What the server's ``send`` raised.
        """
        done, self._app_done = self._app_done, True
        if self._released:
            return
        cancelled = error is not None and not isinstance(error, Exception)
        self._stream.end(error if cancelled else None if done or self._closed else error or Unfinished())
        with anyio.CancelScope(shield=True):
            await self._stream_done.wait()
        if error is None:
            self._raise_error()

    async def _release(self) -> None:
        """It is a file that the server sends: as if nothing had happened."""
        if not self._released:
            self._released = True
            if self._started:
                self._stream.end(Unfinished())  # the file is what is left of it
                await self._stream_done.wait()
            else:
                await self._send(self._start)

    def _failed(self, error: BaseException | None) -> None:
        if error is not None and error is not self._raised and not isinstance(error, Unfinished):
            self._error = error

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._raised = error  # once: an app that deals with it has dealt with it
            raise error

    # The stream's side (stream.DisconnectWatcher)

    async def watch(self) -> None:
        """See `stream.DisconnectWatcher`. A little ahead of the app, whose request's body may not have ended."""
        while not self.disconnected:
            if self._busy or self._ahead > _AHEAD:
                await self._change()
                continue
            self._busy = True
            try:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    self.disconnected = True
                else:
                    self._ahead += len(message.get("body", b""))
                    self._messages.append(message)
            finally:
                self._busy = False
                self._notify()

    def discard(self) -> None:
        """See `stream.DisconnectWatcher`. The body is the app's."""

    def received(self, message: Message | None) -> None:
        """The app's ``receive()`` that was under way at the adoption is over, with a message or without."""
        self._busy = False
        if message is not None and message["type"] == "http.disconnect":
            self.disconnected = self._told = True
            self._let_go()
        self._notify()

    # The app's task (_eventloop.Child)

    def cancel(self) -> None:
        """See `Child`. The app finds a disconnect; if it does not ask, it is cancelled."""
        self._closed = True
        self._failed(self._stream.send_error)
        self._notify()
        self._stream.buffer.release()
        loop = self._stream.loop
        loop.call_at(loop.time() + PATIENCE, self._lose_patience)
        self._let_go()

    def _let_go(self) -> None:
        """An app that was told of the end is on its own, as it is without us: it may clean up, and do what is left."""
        if self._told and self._closed:
            self._stream.end()

    def _lose_patience(self) -> None:
        if not (self._told or self._app_done):
            self._wait.cancel()

    def shield(self) -> None:
        """See `Child`. The app cleans up as it likes."""

    @property
    def cancelled(self) -> bool:
        """See `Child`."""
        return False

    @property
    def running(self) -> bool:
        """See `Child`. Nothing of ours is a step of the app's task."""
        return False

    def force_cancel(self) -> None:
        """See `Child`."""
        if not self._app_done:
            self._wait.cancel(again=True)
