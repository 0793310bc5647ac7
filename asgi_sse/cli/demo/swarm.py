"""Thirty test clients of this server, over real connections: a browser opens too few to show the effect of a drain."""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import anyio
import h11
from anyio.abc import ByteStream
from anyio.streams.memory import MemoryObjectSendStream

from asgi_sse.broker import Broker
from asgi_sse.protocol.decoder import EventDecoder
from asgi_sse.protocol.event import ServerSentEvent
from asgi_sse.routing.request import HTTPError, Request

from .limits import RateLimit
from .ticks import now_ms

_CLIENTS: Final = 30
_STAY_S: Final = 12.0
"""How long the clients stay after the last drain: longer than the longest reconnection time of a drain."""

_LIFETIME_S: Final = 120.0
_CONNECT_TIMEOUT_S: Final = 3.0
"""Time for all clients to connect, on a slow machine."""

_NOTICE_S: Final = 0.1
"""Time for the pages to receive the announcement of a drain before their streams end."""

_RETRY_MS: Final = 1000
"""Reconnection time of a client that the server gave none."""


class Swarm:
    """The test clients. They connect before a drain, and leave some seconds after it.

    Each client reconnects like EventSource: after the reconnection time from the server, with the last event id.

    Args:
        broker: The broker of the channel ``swarm``, a run that reports when clients connect and disconnect.
        path: The path of the stream that the clients read.
    """

    channel: Final = "swarm"

    def __init__(self, broker: Broker, path: str) -> None:
        self._broker = broker
        self._path = path
        self._limit = RateLimit(burst=1, per_second=0.15)
        self._clients: dict[int, dict[str, Any]] = {}
        self._drained_at: int | None = None
        self._leave_at = 0.0
        self._changed: anyio.Event | None = None  # set at the next change of a client

    async def connect(self, request: Request) -> None:
        """Connect all clients, and wait until they are connected.

        Args:
            request: A request to the server that the clients should connect to.

        Raises:
            HTTPError: 429, there were too many requests; 501, the server has no port; 503, no client got a stream.
        """
        host, port = request.scope.get("server") or ("", None)
        if port is None:
            raise HTTPError(501, "the test clients need a server that listens on a port")
        self._limit.take()
        self._leave_at = anyio.current_time() + _STAY_S
        path = quote(request.scope.get("root_path", "").rstrip("/") + self._path)
        source = self._source(host, port, path)
        await self._broker.run(self.channel, source, ttl=0, max_lifetime=_LIFETIME_S, join=True, on_end=self._end)
        with anyio.move_on_after(_CONNECT_TIMEOUT_S):
            while self._open < _CLIENTS:
                self._changed = anyio.Event()
                await self._changed.wait()
        if not self._open:
            raise HTTPError(503, f"the test clients got no stream from port {port}")

    @property
    def _open(self) -> int:
        return sum(client["state"] == "open" for client in self._clients.values())

    async def announce_drain(self) -> None:
        """Publish that all streams are about to end, and wait until the pages should know it."""
        self._drained_at = now_ms()
        self._leave_at = anyio.current_time() + _STAY_S
        self._broker.publish_nowait(self.channel, {"event": "drain", "data": {"at": self._drained_at}})
        await anyio.sleep(_NOTICE_S)

    def state(self) -> dict[str, Any]:
        """Return what a new tab shows."""
        return {"clients": list(self._clients.values()), "drained_at": self._drained_at}

    async def _source(self, host: str, port: int, path: str) -> AsyncIterator[ServerSentEvent]:
        send, receive = anyio.create_memory_object_stream[dict[str, Any]](2 * _CLIENTS)
        async with send, receive, anyio.create_task_group() as tasks:
            for number in range(_CLIENTS):
                tasks.start_soon(partial(_run_client, number, host, port, path, send))
            while (left := self._leave_at - anyio.current_time()) > 0:
                client = None
                with anyio.move_on_after(left):
                    client = await receive.receive()
                if client is not None:
                    self._clients[client["client"]] = client
                    if self._changed is not None:
                        self._changed.set()
                    yield ServerSentEvent(client, event="swarm")
            self._clients = {}
            tasks.cancel_scope.cancel()

    def _end(self, _outcome: str, _error: BaseException | None) -> ServerSentEvent:
        self._clients = {}
        return ServerSentEvent({"client": None, "state": "left", "at": now_ms()}, event="swarm")


async def _run_client(
    number: int, host: str, port: int, path: str, reports: MemoryObjectSendStream[dict[str, Any]]
) -> None:
    """Read the stream and reconnect until cancelled, and report each change."""
    retry_ms, last_event_id = _RETRY_MS, ""

    async def report(state: str, **more: int) -> None:
        await reports.send({"client": number, "state": state, "at": now_ms(), **more})

    while True:
        decoder = EventDecoder()  # a new one for each connection, which drops an event that was cut off
        decoder.last_event_id = last_event_id
        try:
            async with await anyio.connect_tcp(host, port) as stream:
                await _read_stream(stream, f"{host}:{port}", path, decoder, partial(report, "open"))
        except (OSError, anyio.BrokenResourceError, h11.RemoteProtocolError):
            pass  # the connection was cut; the client reconnects as after a proper end
        retry_ms, last_event_id = retry_ms if decoder.retry is None else decoder.retry, decoder.last_event_id
        await report("away", retry=retry_ms)
        await anyio.sleep(retry_ms / 1000)


async def _read_stream(
    stream: ByteStream, authority: str, path: str, decoder: EventDecoder, opened: Callable[[], Awaitable[None]]
) -> None:
    """Send one request and read its event stream to the end; call `opened` at the response headers."""
    http = h11.Connection(h11.CLIENT)
    headers = [("host", authority), ("accept", "text/event-stream")]
    if decoder.last_event_id:
        headers.append(("last-event-id", decoder.last_event_id))
    request = http.send(h11.Request(method="GET", target=path, headers=headers)) or b""
    await stream.send(request + (http.send(h11.EndOfMessage()) or b""))
    while not isinstance(event := http.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
        if event is h11.NEED_DATA:
            try:
                http.receive_data(await stream.receive())
            except anyio.EndOfStream:
                http.receive_data(b"")
        elif isinstance(event, h11.Response):
            if event.status_code != 200:
                return
            await opened()
        elif isinstance(event, h11.Data):
            decoder.feed(bytes(event.data))
