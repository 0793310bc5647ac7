"""`Load`: many readers of one stream, each on a connection of its own, and what they saw.

On bare connections, with h11: a client library would bring a pool and a task for each. Times are those of this process.
"""

import asyncio
import json
import math
import os
import secrets
import ssl
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, cast
from urllib.parse import urlsplit

import h11
import httpx

from asgi_sse.errors import SSEError
from asgi_sse.protocol.decoder import EventDecoder

_PRECISION: Final = 1.01
"""How far apart the times are that a distribution takes for one, so that it is small, however many it has."""

_LEAST: Final = 1e-6
_KNOWN_IDS: Final = 10_000
"""Events of which the first reader's time is kept. Who has one later than so many others counts as its first reader."""

_IN_FLIGHT: Final = 64
"""POSTs that may wait for their answers. When there are as many, the next one is not sent, and that is told."""

_LAST_EVENTS: Final = 2.0
"""Seconds that events which were published have to get there, behind the end."""

_MAX_EVENT: Final = 64 * 1024 * 1024


class Distribution:
    """Times, of which the percentiles are true to 1 %."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self._largest = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self._largest = max(self._largest, seconds)
        self._buckets[round(math.log(max(seconds, _LEAST), _PRECISION))] += 1

    def percentile(self, share: float) -> float:
        """The seconds that `share` of them, of 0 to 1, do not exceed."""
        left = math.ceil(share * self._buckets.total())
        for bucket, number in sorted(self._buckets.items()):
            left -= number
            if left <= 0:
                return min(_PRECISION**bucket, self._largest)
        return self._largest

    def summary(self) -> dict[str, float] | None:
        """In milliseconds; ``None``: there were none."""
        if not self._buckets:
            return None
        shares = {"p50": self.percentile(0.5), "p90": self.percentile(0.9), "p99": self.percentile(0.99)}
        return {name: round(seconds * 1000, 3) for name, seconds in {**shares, "max": self._largest}.items()}


class Load:
    """The readers of one stream, and what they have seen together.

    Args:
        url: The stream.
        headers: Of the requests.
        timeout: Seconds that each connection has until its head.

    Raises:
        SSEError: The URL or a header is none.

    Attributes:
        asked: Connections that were begun.
        opened: Those that had the head of a stream.
        open: Those that read now.
        failed: Those that do not, any more.
        errors: How often something went wrong, by what.
        events: Events that came, since `measure`.
        bytes: Bytes of body that came, since `measure`.
        head: Times from the beginning of a connection until its head.
        first: And until its first event.
        spread: Times by which readers had an event later than the first of them.
        delivery: Times from when an event was sent to be published until a reader had it.
        answer: And until that was answered.
        published: Events that were published.
        skipped: Those that were not, since too many before them were not answered.
        delivered: How often a reader has had one of them.
        expected: How often one was to have.
    """

    def __init__(self, url: str, headers: Iterable[tuple[bytes, bytes]], timeout: float) -> None:
        try:
            parts = urlsplit(url)
            given_port = parts.port
        except ValueError as exc:
            raise SSEError(f"{url!r} is no URL: {exc}") from None
        self.url = url
        self.headers = list(headers)
        self._timeout = timeout
        self._host = parts.hostname or ""
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = given_port or (443 if self._ssl else 80)
        self._address = self._host
        own = [
            (b"Host", parts.netloc.rpartition("@")[2].encode()),
            (b"Accept", b"text/event-stream"),
            (b"Accept-Encoding", b"identity"),
        ]
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        try:
            request = h11.Request(method="GET", target=target, headers=[*own, *self.headers])
        except (h11.LocalProtocolError, UnicodeError) as exc:
            raise SSEError(f"the request cannot be made: {exc}") from None
        self.request = request
        self.asked = self.opened = self.open = self.failed = 0
        self.errors: Counter[str] = Counter()
        self.events = self.bytes = 0
        self.published = self.skipped = self.delivered = self.expected = 0
        self.head, self.first, self.spread = Distribution(), Distribution(), Distribution()
        self.delivery, self.answer = Distribution(), Distribution()
        self._mark = f'{{"bench":"{secrets.token_hex(8)}","sent":'
        self._measuring = False
        self._first_had: dict[str, float] = {}
        self._readers: set[_Reader] = set()

    async def resolve(self) -> None:
        """Find the address of the host, once for all connections.

        Raises:
            SSEError: There is none.
        """
        try:
            found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=1)
        except (OSError, UnicodeError) as exc:
            raise SSEError(f"{self._host} is not known: {getattr(exc, 'strerror', None) or exc}") from None
        self._address = str(found[0][4][0])

    async def connect(self) -> None:
        """One more reader: return when it reads, or has failed."""
        self.asked += 1
        loop = asyncio.get_running_loop()
        reader = _Reader(self, loop.create_future())
        self._readers.add(reader)
        name = self._host if self._ssl else None
        try:
            async with asyncio.timeout(self._timeout):
                await loop.create_connection(
                    lambda: reader, self._address, self._port, ssl=self._ssl, server_hostname=name
                )
                await reader.ready
        except TimeoutError:
            reader.fail("timed out")
        except OSError as exc:
            reader.fail(_reason(exc))

    def measure(self) -> None:
        """Count from now on: all are there. Before, one could have an event that another one was not there for."""
        self._measuring = True
        self.events = self.bytes = 0

    async def publish(self, token: str | None, rate: float, stop: asyncio.Event) -> None:
        """Publish `rate` events a second to the channel until `stop`, and wait for the answers.

        Each at its time, whether or not those before have been answered: else a slow server would be asked less.
        """
        headers = [(name, value) for name, value in self.headers if name.lower() != b"authorization"]
        if token:
            headers.append((b"Authorization", f"Bearer {token}".encode()))
        client = httpx.AsyncClient(
            headers=headers,
            limits=httpx.Limits(max_connections=_IN_FLIGHT),
            timeout=self._timeout,
            verify=self._ssl or True,
            trust_env=False,
        )
        async with (
            client,
            asyncio.TaskGroup() as posts,
        ):
            waiting: set[asyncio.Task[None]] = set()
            due = time.perf_counter()
            while not stop.is_set():
                if len(waiting) < _IN_FLIGHT:
                    post = posts.create_task(self._post(client))
                    waiting.add(post)
                    post.add_done_callback(waiting.discard)
                else:
                    self.skipped += 1
                due += 1 / rate
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), due - time.perf_counter())

    async def _post(self, client: httpx.AsyncClient) -> None:
        readers = self.open
        sent = time.perf_counter()
        try:
            response = await client.post(self.url, content=f"{self._mark}{sent!r}}}")
        except asyncio.CancelledError:
            self.errors["publishing: not answered before the end"] += 1
            raise
        except httpx.HTTPError as exc:
            self.errors[f"publishing: {str(exc) or type(exc).__name__}"] += 1
            return
        if response.status_code != 201:
            self.errors[f"publishing: answered {response.status_code}"] += 1
            return
        self.published += 1
        self.expected += readers
        self.answer.add(time.perf_counter() - sent)

    async def finish(self) -> None:
        """Count no more; wait for what was published and has not come; let go of the connections."""
        self._measuring = False
        until = time.perf_counter() + _LAST_EVENTS
        while self.delivered < self.expected and time.perf_counter() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # not worth an event at each delivery
        for reader in list(self._readers):
            reader.close()

    def take(self, event_id: str, data: str, now: float) -> None:
        """A reader has an event since `now`."""
        if data.startswith(self._mark):
            self.delivered += 1
            self.delivery.add(now - json.loads(data)["sent"])
        if not self._measuring:
            return
        self.events += 1
        first = self._first_had.get(event_id)
        if first is not None:
            self.spread.add(now - first)
        elif event_id:
            if len(self._first_had) >= _KNOWN_IDS:
                del self._first_had[next(iter(self._first_had))]
            self._first_had[event_id] = now

    def count_bytes(self, number: int) -> None:
        """A reader has so many more."""
        if self._measuring:
            self.bytes += number

    def discard(self, reader: "_Reader") -> None:
        """It reads no more."""
        self._readers.discard(reader)


class _Reader(asyncio.Protocol):
    """One connection, and its stream."""

    def __init__(self, load: Load, ready: asyncio.Future[None]) -> None:
        self.ready = ready
        self._load = load
        self._began = time.perf_counter()
        self._http = h11.Connection(h11.CLIENT)
        self._decoder = EventDecoder(max_event_bytes=_MAX_EVENT)
        self._transport: asyncio.Transport | None = None
        self._reads = self._had_one = self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self._transport = cast("asyncio.Transport", transport)
        if self._over:  # it had taken too long
            self._transport.abort()
            return
        request = self._http.send(self._load.request) or b""
        self._transport.write(request + (self._http.send(h11.EndOfMessage()) or b""))

    def data_received(self, data: bytes) -> None:
        """Take what came, as of now."""
        now = time.perf_counter()
        if self._over:
            return
        try:
            self._http.receive_data(data)
            while not self._over and self._take(self._http.next_event(), now):
                pass
        except h11.RemoteProtocolError as exc:
            self.fail("cut by the server" if not data else f"no HTTP: {exc}")
        except SSEError as exc:
            self.fail(str(exc))

    def eof_received(self) -> None:
        """As an end of data: h11 knows whether it is one of the body."""
        self.data_received(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self.fail("cut by the server" if exc is None else _reason(exc))

    def _take(self, event: Any, now: float) -> bool:
        """Take an event of HTTP. Whether there may be more."""
        if isinstance(event, h11.Response):
            self._take_head(event, now)
        elif isinstance(event, h11.Data):
            self._load.count_bytes(len(event.data))
            for message in self._decoder.feed(event.data):
                if not self._had_one:
                    self._had_one = True
                    self._load.first.add(now - self._began)
                self._load.take(message.id or "", message.data or "", now)
        elif isinstance(event, h11.EndOfMessage):
            self.fail("ended by the server")
        return event is not h11.NEED_DATA

    def _take_head(self, response: h11.Response, now: float) -> None:
        headers = dict(response.headers)
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if response.status_code != 200:
            self.fail(f"answered {response.status_code}")
        elif kind != b"text/event-stream":
            self.fail(f"no event stream: {kind.decode('latin-1') or 'no Content-Type'}")
        elif headers.get(b"content-encoding", b"identity") != b"identity":
            self.fail(f"encoded as {headers[b'content-encoding'].decode('latin-1')}")
        else:
            self._reads = True
            self._load.opened += 1
            self._load.open += 1
            self._load.head.add(now - self._began)
            self._done()

    def fail(self, kind: str) -> None:
        """It failed, unless it was over."""
        if not self._over:
            self._load.failed += 1
            self._load.errors[kind] += 1
            self.close()

    def close(self) -> None:
        """Let go of it."""
        self._over = True
        self._load.open -= self._reads
        self._reads = False
        self._load.discard(self)
        self._done()
        if self._transport is not None:
            self._transport.abort()

    def _done(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)


def _reason(exc: Exception) -> str:
    """Short, and the same for each connection: asyncio puts the address beside it."""
    if isinstance(exc, OSError) and not isinstance(exc, ssl.SSLError) and exc.errno:
        return os.strerror(exc.errno).lower()
    return str(exc) or type(exc).__name__
