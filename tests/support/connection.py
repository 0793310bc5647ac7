"""`Connection`: a raw connection to an event stream, which can be slow, cut and resumed."""

import asyncio
import json
import socket
import struct
from contextlib import suppress
from typing import Any, Self

import httptools

from asgi_sse import EventDecoder, ServerSentEvent


class Connection:
    """One connection to a server, and the state of its event stream.

    Args:
        slow: Whether the client has small receive buffers, so that the server is soon blocked.

    Attributes:
        first_id: The first id of the stream; ``""`` before it has come.
        complete: Whether the body has ended as it should.
        ending: The last bytes of the response.
    """

    def __init__(self, *, slow: bool = False) -> None:
        self.sock = socket.socket()
        self.sock.setblocking(False)
        if slow:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            # The segment size of Ethernet. With the large segments of loopback, the server's kernel buffers megabytes.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1_460)
        self.decoder = EventDecoder()
        self.first_id = ""
        self.complete = False
        self.ending = b""
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""
        self._last_bytes = b""  # of the body

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    async def request(self, port: int, path: str, last_event_id: str = "") -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.sock, ("127.0.0.1", port))
        header = f"Last-Event-ID: {last_event_id}\r\n" if last_event_id else ""
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\n{header}Connection: close\r\n\r\n"
        await loop.sock_sendall(self.sock, head.encode())

    async def receive(self, size: int = 65_536) -> bytes:
        """Wait for the next bytes of the body. A cancelled call has read nothing, and can be repeated."""
        while True:
            with suppress(BlockingIOError):
                chunk = self.sock.recv(size)
                break
            await self._readable()
        if not chunk:
            raise ConnectionResetError("the server has closed the connection within the body")
        self.ending = (self.ending + chunk)[-5:]
        self._parser.feed_data(chunk)
        body, self._body = self._body, b""
        return body

    async def _readable(self) -> None:
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(self.sock, event.set)
        try:
            await event.wait()
        finally:
            loop.remove_reader(self.sock)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.complete = True

    async def read(self, size: int = 65_536) -> list[ServerSentEvent]:
        """Wait for the next bytes and return the events that they complete."""
        body = await self.receive(size)
        self._last_bytes = (self._last_bytes + body)[-2:]
        events = []
        while body and not self.first_id:  # line by line, because a later event of the same bytes has another id
            line, end, body = body.partition(b"\n")
            events += self.decoder.feed(line + end)
            self.first_id = self.decoder.last_event_id
        return events + self.decoder.feed(body)

    @property
    def inside(self) -> bool:
        """Whether the bytes so far end within an event."""
        return self._last_bytes not in {b"", b"\n\n"}

    def reset(self) -> None:
        """Close with a TCP reset, as a killed client does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


async def get(port: int, path: str) -> bytes:
    """Return the body of a request."""
    body = b""
    with Connection() as connection:
        await connection.request(port, path)
        while not connection.complete:
            body += await connection.receive()
    return body


async def figures(port: int) -> Any:
    """Return what the app counts, from its route ``/figures``."""
    (event,) = EventDecoder().feed(await get(port, "/figures"))
    return json.loads(str(event.data))
