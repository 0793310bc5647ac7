"""One connection's outgoing bytes: pulled from a feed, coalesced, one send in flight.

The way of an event: the source's task encodes it and pushes it into its `SendBuffer`; that marks the
`StreamWriter` dirty; once a loop turn the `Flusher` lets each dirty writer take what its feed has ready and
send it as one body message. So a burst costs one send, and a client that does not take its message
costs nothing more, since nothing is pulled for it.
"""

import contextvars
from enum import Enum
from typing import Final, Protocol

from asgi_sse.protocol.asgi import Message, Send
from asgi_sse.runtime.base import EventLoop

from .buffer import Feed
from .flusher import Flusher

MESSAGE_BYTES: Final = 65_536
"""The most that one send carries, but for one larger event. Without it, 50 clients on a backlog of
20 MB cost 1 GB; uvicorn's transports pause at the same size."""


class Owner(Protocol):
    """Whose writer it is: a stream."""

    def send_blocked(self) -> None:
        """A send did not complete at once."""
        ...

    def last_message(self) -> None:
        """The message that ends the body is about to be sent."""
        ...

    def writer_done(self, error: BaseException | None) -> None:
        """Nothing more will be sent. With what ``send`` raised, or with ``None`` after the last message."""
        ...


class _State(Enum):
    HELD = "held"  # the head may still change: nothing is sent
    OPEN = "open"
    ENDING = "ending"  # what the feed has is sent, then the end
    DONE = "done"


class StreamWriter:
    """One connection's outgoing bytes; everything that goes to a client goes through here.

    Args:
        send: The request's ``send``.
        feed: What to pull from.
        flusher: That of the running event loop.
        loop: The running event loop.
        owner: Who is told what becomes of it.
        context: In which to send. Private: starting a task eagerly in a context that a suspended step
            has entered hangs the loop.
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
        self._owner: Owner | None = owner  # until nothing more is to be told
        self._sender = loop.sender(send, self._sent, context)
        self._state = _State.HELD
        self._head: Message | None = None
        self._inserts: list[bytes] = []
        self._farewell = b""
        self._cut = False
        self._last = False  # the message under way is the last one
        self._dirty = False
        self.opened = False  # the head is sent, or will be
        self.bytes_sent = 0
        self.idle_since = loop.time()
        self.waiting_since: float | None = None  # when the send under way began

    @property
    def done(self) -> bool:
        """Whether nothing more will be sent."""
        return self._state is _State.DONE

    def open(self, head: Message, block: bytes) -> None:
        """Send the head, then `block`, then what the feed has."""
        self._head = head
        self._state = _State.OPEN
        self.opened = True
        if block:
            self._inserts.append(block)
        self._mark()

    def wake(self) -> None:
        """The feed has something to take."""
        if not self._dirty and self.waiting_since is None:
            self._mark()

    def insert(self, chunk: bytes) -> None:
        """Send `chunk` before the next event, unless one is half sent: nothing may come in between."""
        if self._feed.at_boundary:
            self._inserts.append(chunk)
            self.wake()

    def finish(self, farewell: bytes = b"", *, cut: bool = False) -> None:
        """Send what the feed has, then `farewell`, then the end of the body; `cut` leaves the body without its end."""
        self._state = _State.ENDING
        self._farewell = farewell
        self._cut = cut
        self.wake()

    def abort(self) -> None:
        """Send nothing more, cancel what is under way, and let go of the stream."""
        self._state = _State.DONE
        self._sender.close()
        self._owner = None

    def send_in(self, context: contextvars.Context) -> None:
        """Send in another context, private as well. Before the first message."""
        self._sender.use(context)

    async def wait_closed(self) -> None:
        """After `abort`: wait until what was under way is over."""
        await self._sender.wait_closed()

    def flush_now(self) -> bool:
        """Flush without waiting for the next turn. False: not everything is sent."""
        self.flush()
        return self._state is _State.OPEN and self.waiting_since is None and not (self._dirty or self._feed.ready)

    def flush(self) -> None:
        """Send the next message, and the head before it. Called by the flusher; never raises."""
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
                if self._last:  # a body that stays cut, and nothing was left to say
                    self._over(None)
                elif self._feed.ready:  # what was taken were empty items
                    self._mark()
                else:
                    self._feed.sent()
            elif self._start(message):
                self._sent(None)
        except Exception as exc:  # the other writers of this turn come next
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
