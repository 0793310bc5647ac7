"""`StreamWriter`: pulls the bytes of one connection from a feed and sends them, one message at a time.

The path of an event: the source's task encodes it and pushes it into a `SendBuffer`, which marks the writer. Once a
loop turn the `Flusher` runs each marked writer, which takes everything that is ready and sends it as one body message.
A burst therefore costs one send. A client that does not take its message costs nothing more, since nothing is pulled
for it.
"""

import contextvars
from enum import Enum
from typing import Final, Protocol

from asgi_sse.protocol.asgi import Message, Send
from asgi_sse.runtime.base import EventLoop

from .buffer import Feed
from .flusher import Flusher

MESSAGE_BYTES: Final = 65_536
"""The most bytes that one send carries, except for one larger event. Without this limit, 50 clients on a backlog of
20 MB cost 1 GB. uvicorn's transports pause at the same size."""


class Owner(Protocol):
    """What a writer needs of its stream."""

    def send_blocked(self) -> None:
        """Handle a send that did not complete at once."""
        ...

    def last_message(self) -> None:
        """Prepare for the message that ends the body, which is about to be sent."""
        ...

    def writer_done(self, error: BaseException | None) -> None:
        """Handle the end: ``send`` raised `error`, or the last message is sent."""
        ...


class _State(Enum):
    HELD = "held"  # the response start may still change, so nothing is sent
    OPEN = "open"
    ENDING = "ending"  # the rest of the feed is sent, then the end
    DONE = "done"


class StreamWriter:
    """Sends the bytes of one connection. Everything that a client receives goes through here.

    Args:
        send: The request's ``send``.
        feed: The feed to pull from.
        flusher: The flusher of the running event loop.
        loop: The running event loop.
        owner: The stream.
        context: The context to send in. It must be private: an eager task in a context that a suspended step has
            entered hangs the loop.
    """

    __slots__ = (
        "_cut", "_dirty", "_farewell", "_feed", "_flusher", "_head", "_inserts", "_last", "_loop", "_owner",
        "_sender", "_state", "bytes_sent", "idle_since", "opened", "waiting_since",
    )  # fmt: skip

    def __init__(
        self,
        send: Send,
        feed: Feed,
        *,
        flusher: Flusher,
        loop: EventLoop,
        owner: Owner,
        context: contextvars.Context,
    ) -> None:
        self._feed = feed
        self._flusher = flusher
        self._loop = loop
        self._owner: Owner | None = owner  # until it has nothing more to handle
        self._sender = loop.sender(send, self._sent, context)
        self._state = _State.HELD
        self._head: Message | None = None
        self._inserts: list[bytes] = []
        self._farewell = b""
        self._cut = False
        self._last = False  # whether the message under way is the last one
        self._dirty = False
        self.opened: bool = False  # whether the response start is sent, or is about to be
        self.bytes_sent: int = 0
        self.idle_since: float = loop.time()
        self.waiting_since: float | None = None  # since when the current send waits

    @property
    def done(self) -> bool:
        """Whether nothing more will be sent."""
        return self._state is _State.DONE

    def open(self, head: Message, block: bytes) -> None:
        """Send the response start, then `block`, then what the feed has."""
        self._head = head
        self._state = _State.OPEN
        self.opened = True
        if block:
            self._inserts.append(block)
        self._mark()

    def wake(self) -> None:
        """Schedule a flush, because the feed has something to take."""
        if not self._dirty and self.waiting_since is None:
            self._mark()

    def insert(self, chunk: bytes) -> None:
        """Send `chunk` before the next event, unless an event is half sent."""
        if self._feed.at_boundary:
            self._inserts.append(chunk)
            self.wake()

    def finish(self, farewell: bytes = b"", *, cut: bool = False) -> None:
        """Send the rest of the feed, then `farewell`, then the end of the body; with `cut`, leave out the end."""
        self._state = _State.ENDING
        self._farewell = farewell
        self._cut = cut
        self.wake()

    def abort(self) -> None:
        """Send nothing more, cancel the current send, and release the stream."""
        self._state = _State.DONE
        self._sender.close()
        self._owner = None

    def send_in(self, context: contextvars.Context) -> None:
        """Send in another private context. Call it before the first message."""
        self._sender.use(context)

    async def wait_closed(self) -> None:
        """Wait until the send that `abort` cancelled has ended."""
        await self._sender.wait_closed()

    def flush_now(self) -> bool:
        """Flush without waiting for the next turn. Return whether everything is sent."""
        self.flush()
        return self._state is _State.OPEN and self.waiting_since is None and not (self._dirty or self._feed.ready)

    def flush(self) -> None:
        """Send the next message, after the response start. The flusher calls it; it never raises."""
        self._dirty = False
        if self.waiting_since is not None or self._state in (_State.HELD, _State.DONE):
            return
        try:
            if self._head is not None:
                head, self._head = self._head, None
                if not self._start(head):
                    return
            message = self._next()
            if message is None:
                if self._last:  # a cut body with nothing left to send
                    self._over(None)
                elif self._feed.ready:  # only empty items were taken
                    self._mark()
                else:
                    self._feed.sent()
            elif self._start(message):
                self._sent(None)
        except Exception as exc:  # the other writers of this turn must still run
            self._over(exc)

    def _next(self) -> Message | None:
        feed = self._feed
        parts = []
        size = 0
        if self._inserts and feed.at_boundary:
            parts, self._inserts = self._inserts, []
            size = sum(map(len, parts))
        if feed.ready:
            parts.append(feed.take(MESSAGE_BYTES - size))
        if self._state is _State.ENDING and not feed.ready:
            self._last = True
            if self._farewell and feed.at_boundary:
                parts.append(self._farewell)
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        more_body = not self._last or self._cut
        if not body and more_body:
            return None
        self.bytes_sent += len(body)
        if not more_body and self._owner is not None:
            self._owner.last_message()
        return {"type": "http.response.body", "body": body, "more_body": more_body}

    def _start(self, message: Message) -> bool:
        if self._sender.start(message):
            return True
        self.waiting_since = self._loop.time()
        if self._owner is not None:
            self._owner.send_blocked()
        return False

    def _sent(self, error: BaseException | None) -> None:
        self.waiting_since = None
        if error is not None or self._last:
            self._over(error)
            return
        self.idle_since = self._loop.time()
        if self._head is not None or self._inserts or self._state is _State.ENDING or self._feed.ready:
            self._mark()
        else:
            self._feed.sent()

    def _over(self, error: BaseException | None) -> None:
        if self._state is not _State.DONE:
            owner = self._owner
            self.abort()
            if owner is not None:
                owner.writer_done(error)

    def _mark(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._flusher.mark(self)
