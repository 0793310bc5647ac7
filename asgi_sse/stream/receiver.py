"""The one reader of a request's ``receive()``: hands the body to who asks, and latches the disconnect."""

from typing import Final

import anyio

from asgi_sse.protocol.asgi import Message, Receive

_AHEAD: Final = 65_536
"""Bytes of body taken from the server before anybody asked: as much as one send carries."""


class Changing:
    """Something that one task waits to change and another one changes; costs nothing while nobody waits."""

    __slots__ = ("_changed",)

    def __init__(self) -> None:
        self._changed: anyio.Event | None = None  # made by who waits: a callback of the loop must not ask anyio for one

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None


class RequestReceiver(Changing):
    """Reads ``receive()`` for the body and for the watch alike, so that there is never a second reader.

    hypercorn and daphne block for ever on a ``receive()`` after the disconnect, so it is remembered.
    """

    __slots__ = (
        "_busy", "_chunks", "_complete", "_readers", "_receive", "_replayed", "_size",
        "discarded", "disconnected",
    )  # fmt: skip

    def __init__(self, receive: Receive) -> None:
        super().__init__()
        self._receive = receive
        self._chunks: list[bytes] = []
        self._size = 0
        self._complete = False
        self.discarded = False
        self._busy = False  # somebody waits in receive()
        self.disconnected = False
        self._readers = 0
        self._replayed = False  # to its end

    async def watch(self) -> None:
        """Read on until the client has left."""
        while not self.disconnected:
            ahead = self._size > _AHEAD and not (self._complete or self.reading or self.discarded)
            if ahead or self._busy:  # what is left stays with the server, whose buffers are bounded
                await self._change()
                continue
            self._busy = True
            try:  # not _read_once: its frame would stay with each idle stream
                self._take(await self._receive())
            finally:
                self._busy = False
                self._notify()

    async def body(self, limit: int) -> bytes | None:
        """The whole body; ``None`` if it exceeds `limit` bytes, was discarded, or the client left before its end."""
        self._readers += 1
        self._notify()
        try:
            while not (self._complete or self._size > limit or self.discarded or self.disconnected):
                if self._busy:
                    await self._change()
                else:
                    await self._read_once()
        finally:
            self._readers -= 1
        if self._size > limit:
            self.discard()
            return None
        return b"".join(self._chunks) if self._complete and not self.discarded else None

    async def _read_once(self) -> None:
        self._busy = True
        try:
            self._take(await self._receive())
        finally:
            self._busy = False
            self._notify()

    @property
    def reading(self) -> bool:
        """Whether somebody waits for the body."""
        return self._readers > 0

    def discard(self) -> None:
        """What is still to come of the body is not wanted: read past it, to see the disconnect behind."""
        if not (self._complete or self.reading):
            self.discarded = True
            self._chunks.clear()
            self._notify()

    def exceeds(self, limit: int) -> bool:
        """Whether more than `limit` bytes of body have come."""
        return self._size > limit

    async def replay(self) -> Message:
        """``receive()`` for another ASGI app that takes the request over, with nothing lost."""
        if self._chunks or (self._complete and not self._replayed):
            self._replayed = self._complete
            body = b"".join(self._chunks)
            self._chunks.clear()
            return {"type": "http.request", "body": body, "more_body": not self._complete}
        if self.disconnected:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self.disconnected = message["type"] == "http.disconnect"
        return message

    def _take(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self.disconnected = True
        elif message["type"] == "http.request" and not self._complete:
            chunk = message.get("body", b"")
            self._size += len(chunk)
            if chunk and not self.discarded:
                self._chunks.append(chunk)
            self._complete = not message.get("more_body", False)
