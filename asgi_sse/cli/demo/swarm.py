"""Clients of this server, in this process, over real connections: a browser opens too few to show what a drain does."""

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

from .limits import Allowance
from .ticks import now

_CLIENTS: Final = 30
_STAY: Final = 12.0
"""Seconds after the last drain for which they stay: more than the longest time that a drain may keep them away."""

_LIFETIME: Final = 120.0
_PATIENCE: Final = 3.0
"""Seconds for all of them to come, on a slow machine."""

_NOTICE: Final = 0.1
"""Seconds in which pages learn that their streams are about to end."""

_RETRY: Final = 1000
"""Milliseconds until the next try, where the server has not told any."""


class Swarm:
    """The clients, who come when they are called, and leave some seconds after.

    Each does what an EventSource does: it comes back after the time that it was told, with the id that it has seen.

    Args:
        broker: On whose channel ``swarm`` they say when they come and go: a run.
        path: What they ask this server for.
    """

    channel: Final = "swarm"

    def __init__(self, broker: Broker, path: str) -> None:
        self._broker = broker
        self._path = path
        self._allowance = Allowance(burst=1, per_second=0.15)
        self._clients: dict[int, dict[str, Any]] = {}
        self._drained_at: int | None = None
        self._leave_at = 0.0
        self._came: anyio.Event | None = None  # while they are waited for

    async def call(self, request: Request) -> None:
        """Have them all here.

        Args:
            request: One to the server that they are to come to.

        Raises:
            HTTPError: 429, they were called too often; 501, 503: they have no way to this server.
        """
        host, port = request.scope.get("server") or ("", None)
        if port is None:
            raise HTTPError(501, "the clients need a server that listens on a port")
        self._allowance.take()
        self._leave_at = anyio.current_time() + _STAY
        path = quote(request.scope.get("root_path", "").rstrip("/") + self._path)
        source = self._source(host, port, path)
        await self._broker.run(self.channel, source, ttl=0, max_lifetime=_LIFETIME, join=True, on_end=self._end)
        with anyio.move_on_after(_PATIENCE):
            while self._open < _CLIENTS:
                self._came = anyio.Event()
                await self._came.wait()
        if not self._open:
            raise HTTPError(503, f"the clients got no stream from port {port}")

    @property
    def _open(self) -> int:
        return sum(client["state"] == "open" for client in self._clients.values())

    async def drained(self) -> None:
        """All streams are about to be ended: return when pages know that."""
        self._drained_at = now()
        self._leave_at = anyio.current_time() + _STAY
        self._broker.publish_nowait(self.channel, {"event": "drain", "data": {"at": self._drained_at}})
        await anyio.sleep(_NOTICE)

    def state(self) -> dict[str, Any]:
        """What who comes anew is shown."""
        return {"clients": list(self._clients.values()), "drained_at": self._drained_at}

    async def _source(self, host: str, port: int, path: str) -> AsyncIterator[ServerSentEvent]:
        said, heard = anyio.create_memory_object_stream[dict[str, Any]](2 * _CLIENTS)
        async with said, heard, anyio.create_task_group() as tasks:
            for number in range(_CLIENTS):
                tasks.start_soon(partial(_client, number, host, port, path, said))
            while (left := self._leave_at - anyio.current_time()) > 0:
                client = None
                with anyio.move_on_after(left):
                    client = await heard.receive()
                if client is not None:
                    self._clients[client["client"]] = client
                    if self._came is not None:
                        self._came.set()
                    yield ServerSentEvent(client, event="swarm")
            self._clients = {}
            tasks.cancel_scope.cancel()

    def _end(self, _outcome: str, _error: BaseException | None) -> ServerSentEvent:
        self._clients = {}
        return ServerSentEvent({"client": None, "state": "left", "at": now()}, event="swarm")


async def _client(number: int, host: str, port: int, path: str, said: MemoryObjectSendStream[dict[str, Any]]) -> None:
    retry, last_event_id = _RETRY, ""

    async def say(state: str, **more: int) -> None:
        await said.send({"client": number, "state": state, "at": now(), **more})

    while True:
        decoder = EventDecoder()  # a block that was cut is of no event
        decoder.last_event_id = last_event_id
        try:
            async with await anyio.connect_tcp(host, port) as stream:
                await _follow(stream, f"{host}:{port}", path, decoder, partial(say, "open"))
        except (OSError, anyio.BrokenResourceError, h11.RemoteProtocolError):
            pass  # cut: a client comes back from that as from a proper end
        retry, last_event_id = retry if decoder.retry is None else decoder.retry, decoder.last_event_id
        await say("away", retry=retry)
        await anyio.sleep(retry / 1000)


async def _follow(
    stream: ByteStream, authority: str, path: str, decoder: EventDecoder, opened: Callable[[], Awaitable[None]]
) -> None:
    """One request, until the end of its event stream. `opened` is called when its head has come."""
    http = h11.Connection(h11.CLIENT)
    headers = [("host", authority), ("accept", "text/event-stream")]
    if decoder.last_event_id:
        headers.append(("last-event-id", decoder.last_event_id))
    head = http.send(h11.Request(method="GET", target=path, headers=headers)) or b""
    await stream.send(head + (http.send(h11.EndOfMessage()) or b""))
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
