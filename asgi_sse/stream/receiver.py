"""`RequestReceiver`: the one reader of a request's ``receive()``, for its body and its disconnect."""

from typing import Final

from asgi_sse.protocol.asgi import Message, Receive
from asgi_sse.runtime.condition import ChangeNotifier

_READ_AHEAD_BYTES: Final = 65_536
"""Bytes of the request body that are read before the app asks for them; as much as one send carries."""


class RequestReceiver(ChangeNotifier):
    """Reads ``receive()`` both for the body and for the disconnect, so that there is never a second reader.

    It remembers the disconnect, because hypercorn and daphne block for ever on a ``receive()`` after it.

    Attributes:
        disconnected: Whether the client has disconnected.
        discarded: Whether the rest of the body is read and thrown away.
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
        self.discarded: bool = False
        self._busy = False  # a task waits in receive()
        self.disconnected: bool = False
        self._readers = 0
        self._replayed = False  # whether the last message of the body was replayed

    async def watch(self) -> None:
        """Read until the client disconnects."""
        while not self.disconnected:
            ahead = self._size > _READ_AHEAD_BYTES and not (self._complete or self.reading or self.discarded)
            if ahead or self._busy:  # the rest stays with the server, whose buffers are bounded
                await self.wait_changed()
                continue
            self._busy = True
            try:  # not _read_once(), whose frame each idle stream would keep
                self._take(await self._receive())
            finally:
                self._busy = False
                self.notify_changed()

    async def body(self, limit: int) -> bytes | None:
        """Read the whole body.

        Returns:
            The body; ``None`` if it has more than `limit` bytes, was discarded, or the client disconnected before
            its end.
        """
        self._readers += 1
        self.notify_changed()
        try:
            while not (self._complete or self._size > limit or self.discarded or self.disconnected):
                if self._busy:
                    await self.wait_changed()
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
            self.notify_changed()

    @property
    def reading(self) -> bool:
        """Whether the app is waiting for the body."""
        return self._readers > 0

    def discard(self) -> None:
        """Throw away the rest of the body. It is still read, since the disconnect comes after it."""
        if not (self._complete or self.reading):
            self.discarded = True
            self._chunks.clear()
            self.notify_changed()

    async def replay(self) -> Message:
        """Act as ``receive()`` for another ASGI app that takes over the request. Nothing of the body is lost."""
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
