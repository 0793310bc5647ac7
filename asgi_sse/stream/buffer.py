"""`Feed`: what an writer pulls from; and the feeds of sources that run in a task, `SendBuffer` and `UnbufferedSend`."""

from collections.abc import Callable
from typing import Final, Protocol

import anyio

from .flusher import Flusher

TURN_BYTES: Final = 16_384
"""What a source may add before it waits for its next turn."""

_ITEM_BYTES: Final = 16
"""What an item counts beside its bytes, so that a source of empty items has to wait too."""


class Feed(Protocol):
    """What an writer pulls from."""

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


class SendBuffer:
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
        if not chunks:  # else the writer knows already that there is something to take
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


class UnbufferedSend(SendBuffer):
    """A buffer that asks the source for nothing before what it gave is sent, each item as a message of its own.

    What is attached sends what there is in this very turn, if it can, and says whether that is all of it.
    """

    __slots__ = ("_turn",)

    def __init__(self, flusher: Flusher) -> None:
        super().__init__(flusher)
        self._turn = 0  # bytes sent since others had a turn

    def push(self, chunk: bytes) -> bool:
        """See `SendBuffer`."""
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


def _nothing() -> None:
    """Nobody listens."""
