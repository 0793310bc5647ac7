"""One connection's outgoing bytes: pulled from a feed, coalesced, one send in flight.

The way of an event: the source's task encodes it and pushes it into its `Buffer`; that marks the
`Outbox` dirty; once a loop turn the `Flusher` lets each dirty outbox take what its feed has ready and
send it as one body message. So a burst costs one send, and a client that does not take its message
costs nothing more, since nothing is pulled for it.
"""

import contextvars
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

import anyio
from anyio.lowlevel import RunVar

from ._eventloop import EventLoop, current_loop
from ._types import Message, Send

MESSAGE_BYTES: Final = 65_536
"""The most that one send carries, but for one larger event. Without it, 50 clients on a backlog of
20 MB cost 1 GB; uvicorn's transports pause at the same size."""

TURN_BYTES: Final = 16_384
"""What a source may add before it waits for its next turn."""

TURN_SOURCES: Final = 4
"""How many waiting sources go on in one loop turn. uvloop accepts one connection a turn: without a
limit, 200 flat-out sources kept a newcomer waiting for over 10 s; with 4, for 0.06 s."""

_LONG_ROUND: Final = 0.002
"""Seconds of one round of flushing, from which on the loop rests behind it, for as long as it took."""

_REST: Final = 0.02
"""The longest rest, in seconds. What is ready by its end leaves in one message: without, 200 events/s to 1,000 clients
took all of a core, at 5.0 us a delivery; with it 60 % at 3.0 us."""

_ITEM_BYTES: Final = 16
"""What an item counts beside its bytes, so that a source of empty items has to wait too."""


class Feed(Protocol):
    """What an outbox pulls from."""

    @property
    def ready(self) -> bool:
        """Whether `take` would give anything."""
        ...

    @property
    def at_boundary(self) -> bool:
        """Whether what was taken so far ends between two events."""
        ...

    def take(self, limit: int) -> bytes:
        """What is ready, whole events, at most `limit` bytes or one larger event."""
        ...

    def sent(self) -> None:
        """All that was taken is sent."""
        ...


class Flusher:
    """Runs once in each turn of its event loop that has something to do.

    First it flushes each dirty outbox, in isolation; then it lets a few waiting sources go on.
    """

    __slots__ = ("_dirty", "_loop", "_owner", "_scheduled", "_waiting")

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._dirty: list[Outbox] = []
        self._waiting: deque[anyio.Event] = deque()
        self._scheduled = False

    def mark(self, outbox: "Outbox") -> None:
        """Flush `outbox` in the next turn."""
        self._dirty.append(outbox)
        self._schedule()

    def resume(self, source: anyio.Event) -> None:
        """Set `source` when its turn comes."""
        self._waiting.append(source)
        self._schedule()

    async def turn(self) -> None:
        """Wait until all that is dirty was flushed."""
        turn = anyio.Event()
        self.resume(turn)
        await turn.wait()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        dirty, self._dirty = self._dirty, []
        began = self._loop.time()
        for outbox in dirty:
            outbox.flush()
        took = self._loop.time() - began
        if took >= _LONG_ROUND and not (self._waiting or self._dirty):
            self._loop.call_at(began + took + min(took, _REST), self._go_on)
        else:
            for _ in range(min(TURN_SOURCES, len(self._waiting))):
                self._waiting.popleft().set()
            self._go_on()

    def _go_on(self) -> None:
        self._scheduled = False
        if self._dirty or self._waiting:
            self._schedule()


_flusher: RunVar[Flusher] = RunVar("asgi_sse flusher")


def current_flusher() -> Flusher:
    """The flusher of the event loop that the caller runs in."""
    try:
        return _flusher.get()
    except LookupError:
        flusher = Flusher(current_loop())
        _flusher.set(flusher)
        return flusher


class Buffer:
    """The feed of a source that runs in a task: a short queue of encoded events."""

    __slots__ = ("_chunks", "_flusher", "_room", "_size", "_tail", "_taken", "_wake")

    def __init__(self, flusher: Flusher) -> None:
        self._flusher = flusher
        self._wake: Callable[[], object] = _nothing
        self._chunks: list[bytes] = []
        self._size = 0
        self._taken = 0  # items, ever
        self._room: anyio.Event | None = None
        self._tail = b""  # of the bytes taken: foreign ones may end anywhere

    def attach(self, wake: Callable[[], object]) -> None:
        """Call `wake` when there is something to take."""
        self._wake = wake

    def detach(self) -> None:
        """The stream is over: what is still pushed goes nowhere."""
        self._wake = _nothing

    def stop(self) -> None:
        """See `stream.Live`: what was pushed is sent in any case."""

    @property
    def pushed(self) -> int:
        """How many items were added, ever."""
        return self._taken + len(self._chunks)

    @property
    def ready(self) -> bool:
        """Whether there is anything to take."""
        return bool(self._chunks)

    @property
    def at_boundary(self) -> bool:
        """Whether what was taken ends with a blank line, or is nothing."""
        return ends_event(self._tail)

    def push(self, chunk: bytes) -> bool:
        """Add one event, or foreign bytes that may end anywhere. True: now wait for `room`."""
        chunks = self._chunks
        if not chunks:  # else the outbox knows already that there is something to take
            self._wake()
        chunks.append(chunk)
        self._size += len(chunk) + _ITEM_BYTES
        return self._size >= TURN_BYTES

    async def room(self) -> None:
        """Wait until enough was taken and the source's turn has come."""
        self._room = anyio.Event()
        try:
            await self._room.wait()
        finally:
            self._room = None

    def release(self) -> None:
        """Let go who waits for room: nothing will be taken any more."""
        if self._room is not None:
            self._room.set()

    def take(self, limit: int) -> bytes:
        """See `Feed`."""
        chunks = self._chunks
        if self._size <= limit:
            self._chunks = []
            self._size = 0
        else:
            count = size = 0
            for chunk in chunks:
                size += len(chunk)
                if size > limit and count:
                    break
                count += 1
            self._chunks = chunks[count:]
            chunks = chunks[:count]
            self._size -= sum(map(len, chunks)) + count * _ITEM_BYTES
        self._taken += len(chunks)
        taken = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._tail = (self._tail + taken[-4:])[-4:]
        if self._size < TURN_BYTES:
            self._let_on()
        return taken

    def _let_on(self) -> None:
        if self._room is not None:
            room, self._room = self._room, None
            self._flusher.resume(room)

    def sent(self) -> None:
        """See `Feed`."""


class Lockstep(Buffer):
    """A buffer that asks the source for nothing before what it gave is sent, each item as a message of its own.

    What is attached sends what there is in this very turn, if it can, and says whether that is all of it.
    """

    __slots__ = ("_turn",)

    def __init__(self, flusher: Flusher) -> None:
        super().__init__(flusher)
        self._turn = 0  # bytes sent since others had a turn

    def push(self, chunk: bytes) -> bool:
        """See `Buffer`."""
        self._chunks.append(chunk)
        self._size += len(chunk) + _ITEM_BYTES
        self._turn += len(chunk) + _ITEM_BYTES
        return not self._wake() or self._turn >= TURN_BYTES

    def _let_on(self) -> None:
        """Taken is not sent: `sent` lets the source go on."""

    async def room(self) -> None:
        """Wait until all is sent, and in any case for the source's turn."""
        self._turn = 0
        all_sent = self._wake()  # before there is a wait that `sent` would end
        self._room = room = anyio.Event()
        if all_sent:
            self._flusher.resume(room)
        try:
            await room.wait()
        finally:
            self._room = None

    def sent(self) -> None:
        """See `Feed`."""
        self.release()


def ends_event(tail: bytes) -> bool:
    r"""Whether a stream whose last four bytes are `tail` stands between two events.

    It does at its start, and after a blank line: an end of line right behind another, each of them
    CR, LF or CRLF. Behind a CR that a LF may still follow, the line has ended already.
    """
    if not tail:
        return True
    if tail.endswith(b"\r\n"):
        tail = tail[:-2]
    elif tail.endswith((b"\r", b"\n")):
        tail = tail[:-1]
    else:
        return False
    return not tail or tail.endswith((b"\r", b"\n"))


class Owner(Protocol):
    """Whose outbox it is: a stream."""

    def send_blocked(self) -> None:
        """A send did not complete at once."""
        ...

    def last_message(self) -> None:
        """The message that ends the body is about to be sent."""
        ...

    def outbox_done(self, error: BaseException | None) -> None:
        """Nothing more will be sent. With what ``send`` raised, or with ``None`` after the last message."""
        ...


class _State(Enum):
    HELD = "held"  # the head may still change: nothing is sent
    OPEN = "open"
    ENDING = "ending"  # what the feed has is sent, then the end
    DONE = "done"


class Outbox:
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
        except Exception as exc:  # the other outboxes of this turn come next
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
                owner.outbox_done(error)

    def _mark(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._flusher.mark(self)


def _nothing() -> None:
    """Nobody listens."""
