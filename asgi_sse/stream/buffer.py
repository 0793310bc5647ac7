"""`Feed`, which a writer pulls from, and the feeds of sources that run in a task: `SendBuffer`, `UnbufferedSend`."""

from collections.abc import Callable
from typing import Final, Protocol

import anyio

from .flusher import Flusher

TURN_BYTES: Final = 16_384
"""Bytes that a source may add before it waits for its next turn."""

_ITEM_BYTES: Final = 16
"""Bytes that each item counts in addition, so that a source of empty items has to wait too."""


class Feed(Protocol):
    """Where a writer gets its bytes."""

    @property
    def ready(self) -> bool:
        """Whether `take` would return anything."""
        ...

    @property
    def at_boundary(self) -> bool:
        """Whether the bytes taken so far end between two events."""
        ...

    def take(self, limit: int) -> bytes:
        """Take whole events that are ready: at most `limit` bytes, or one larger event."""
        ...

    def sent(self) -> None:
        """Accept that everything taken was sent."""
        ...


class SendBuffer:
    """A short queue of encoded events between a source's task and its writer."""

    __slots__ = ("_chunks", "_flusher", "_room", "_size", "_tail", "_taken", "_wake")

    def __init__(self, flusher: Flusher) -> None:
        self._flusher = flusher
        self._wake: Callable[[], object] = _nothing
        self._chunks: list[bytes] = []
        self._size = 0
        self._taken = 0  # items, ever
        self._room: anyio.Event | None = None
        self._tail = b""  # the last bytes taken; the bytes of an adopted stream may end anywhere

    def attach(self, wake: Callable[[], object]) -> None:
        """Call `wake` whenever there is something to take."""
        self._wake = wake

    def detach(self) -> None:
        """Release the writer, because the stream is over. Nothing is sent any more."""
        self._wake = _nothing

    @property
    def pushed(self) -> int:
        """The number of items added so far."""
        return self._taken + len(self._chunks)

    @property
    def ready(self) -> bool:
        """Whether there is anything to take."""
        return bool(self._chunks)

    @property
    def at_boundary(self) -> bool:
        """Whether the bytes taken so far end with a blank line, or are empty."""
        return ends_event(self._tail)

    def push(self, chunk: bytes) -> bool:
        """Add one event, or bytes that may end anywhere. Return True if the source must now wait for `room`."""
        chunks = self._chunks
        if not chunks:  # otherwise the writer knows already that there is something to take
            self._wake()
        chunks.append(chunk)
        self._size += len(chunk) + _ITEM_BYTES
        return self._size >= TURN_BYTES

    async def room(self) -> None:
        """Wait until enough is taken and the source's turn comes."""
        self._room = anyio.Event()
        try:
            await self._room.wait()
        finally:
            self._room = None

    def release(self) -> None:
        """Wake the waiting source, because nothing will be taken any more."""
        if self._room is not None:
            self._room.set()

    def take(self, limit: int) -> bytes:
        """Take what is ready, and let the source continue if there is room."""
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
            self._wake_source()
        return taken

    def _wake_source(self) -> None:
        if self._room is not None:
            room, self._room = self._room, None
            self._flusher.resume(room)

    def sent(self) -> None:
        """Do nothing: the source continues as soon as its items are taken."""


class UnbufferedSend(SendBuffer):
    """A buffer that sends each item as a message of its own before it asks the source for the next.

    The function that is attached sends at once, if it can, and returns whether everything was sent.
    """

    __slots__ = ("_turn",)

    def __init__(self, flusher: Flusher) -> None:
        super().__init__(flusher)
        self._turn = 0  # bytes sent since other sources had a turn

    def push(self, chunk: bytes) -> bool:
        """Send one item at once. Return True if the source must now wait for `room`."""
        self._chunks.append(chunk)
        self._size += len(chunk) + _ITEM_BYTES
        self._turn += len(chunk) + _ITEM_BYTES
        return not self._wake() or self._turn >= TURN_BYTES

    def _wake_source(self) -> None:
        """Do nothing: the source continues only when its item is sent."""

    async def room(self) -> None:
        """Wait until everything is sent, and for the source's turn."""
        self._turn = 0
        all_sent = self._wake()  # before `sent` could end the wait
        self._room = room = anyio.Event()
        if all_sent:
            self._flusher.resume(room)
        try:
            await room.wait()
        finally:
            self._room = None

    def sent(self) -> None:
        """Let the source continue, because everything is sent."""
        self.release()


def ends_event(tail: bytes) -> bool:
    r"""Return whether a stream that ends with the bytes `tail` is between two events.

    It is at its start, and after a blank line: two line ends in a row, each of them CR, LF or CRLF. A CR ends its line
    even if a LF may still follow.

    Args:
        tail: The last four bytes of the stream, or all of it.
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
    """Do nothing, in place of a writer."""
