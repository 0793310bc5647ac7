"""Many clients of one stream, each on a connection of its own, and what they measure.

The clients are bare asyncio protocols with h11: a client library would add a pool and a task for each connection, and
the measured times include the work of this process.
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
"""Ratio of two neighbouring buckets. Percentiles are exact to 1 %, in little memory however many times are added."""

_SHORTEST_S: Final = 1e-6
_KNOWN_IDS: Final = 10_000
"""Event ids whose first arrival is kept. A client that is further behind counts as the first to receive an event."""

_IN_FLIGHT: Final = 64
"""POSTs that may be unanswered at a time. Further events are skipped and counted."""

_LAST_EVENTS_S: Final = 2.0
"""How long to wait after the end for published events that have not arrived everywhere."""

_MAX_EVENT_BYTES: Final = 64 * 1024 * 1024


class Distribution:
    """Durations, with percentiles that are exact to 1 %."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self._largest = 0.0

    def add(self, seconds: float) -> None:
        """Add a duration."""
        self._largest = max(self._largest, seconds)
        self._buckets[round(math.log(max(seconds, _SHORTEST_S), _PRECISION))] += 1

    def percentile(self, share: float) -> float:
        """Return the seconds that a `share` of the durations, from 0 to 1, does not exceed."""
        left = math.ceil(share * self._buckets.total())
        for bucket, number in sorted(self._buckets.items()):
            left -= number
            if left <= 0:
                return min(_PRECISION**bucket, self._largest)
        return self._largest

    def summary(self) -> dict[str, float] | None:
        """Return the percentiles and the maximum in milliseconds, or ``None`` without durations."""
        if not self._buckets:
            return None
        shares = {"p50": self.percentile(0.5), "p90": self.percentile(0.9), "p99": self.percentile(0.99)}
        return {name: round(seconds * 1000, 3) for name, seconds in {**shares, "max": self._largest}.items()}


class Load:
    """The clients of one stream, and their measurements.

    Args:
        url: The URL of the stream.
        headers: Headers of the requests.
        timeout: Seconds that each connection has to receive its response headers.

    Raises:
        SSEError: The URL or a header is invalid.

    Attributes:
        started: Connections that were started.
        opened: Connections that received the response headers of an event stream.
        open: Connections that are open now.
        failed: Connections that failed or were ended by the server.
        errors: Number of failures of each kind.
        events: Events received since `measure`, by all clients.
        bytes: Bytes of body received since `measure`, by all clients.
        head: Durations from the start of a connection to its response headers.
        first: Durations from the start of a connection to its first event.
        spread: Durations from the first client that received an event to each other client.
        delivery: Durations from before a POST to each client that received its event.
        answer: Durations from before a POST to its answer.
        published: Events that were published.
        skipped: Events that were not published because too many POSTs were unanswered.
        delivered: Number of times that a client received a published event.
        expected: Number of times that clients should have received one.
    """

    started: int
    opened: int
    open: int
    failed: int
    events: int
    published: int
    skipped: int
    delivered: int
    expected: int

    def __init__(self, url: str, headers: Iterable[tuple[bytes, bytes]], timeout: float) -> None:
        try:
            parts = urlsplit(url)
            explicit_port = parts.port
        except ValueError as exc:
            raise SSEError(f"url must be an http or https URL, got {url!r}: {exc}") from None
        self.url = url
        self.headers: list[tuple[bytes, bytes]] = list(headers)
        self._timeout = timeout
        self._host = parts.hostname or ""
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = explicit_port or (443 if self._ssl else 80)
        self._address = self._host
        own_headers = [
            (b"Host", parts.netloc.rpartition("@")[2].encode()),
            (b"Accept", b"text/event-stream"),
            (b"Accept-Encoding", b"identity"),
        ]
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        try:
            request = h11.Request(method="GET", target=target, headers=[*own_headers, *self.headers])
        except (h11.LocalProtocolError, UnicodeError) as exc:
            raise SSEError(f"cannot send the request: {exc}") from None
        self.request = request
        self.started = self.opened = self.open = self.failed = 0
        self.errors: Counter[str] = Counter()
        self.events = 0
        self.bytes: int = 0
        self.published = self.skipped = self.delivered = self.expected = 0
        self.head: Distribution = Distribution()
        self.first: Distribution = Distribution()
        self.spread: Distribution = Distribution()
        self.delivery: Distribution = Distribution()
        self.answer: Distribution = Distribution()
        # The start of every event that this process publishes, which tells them from the events of others.
        self._mark = f'{{"bench":"{secrets.token_hex(8)}","sent":'
        self._measuring = False
        self._first_arrival: dict[str, float] = {}  # by event id
        self._clients: set[_Client] = set()

    async def resolve(self) -> None:
        """Resolve the host once for all connections.

        Raises:
            SSEError: The host has no address.
        """
        try:
            found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=1)
        except (OSError, UnicodeError) as exc:
            raise SSEError(f"cannot resolve {self._host}: {getattr(exc, 'strerror', None) or exc}") from None
        self._address = str(found[0][4][0])

    async def connect(self) -> None:
        """Start one more connection, and wait until it is open or has failed."""
        self.started += 1
        loop = asyncio.get_running_loop()
        client = _Client(self, loop.create_future())
        self._clients.add(client)
        name = self._host if self._ssl else None
        try:
            async with asyncio.timeout(self._timeout):
                await loop.create_connection(
                    lambda: client, self._address, self._port, ssl=self._ssl, server_hostname=name
                )
                await client.ready
        except TimeoutError:
            client.fail("timed out")
        except OSError as exc:
            client.fail(_reason(exc))

    def measure(self) -> None:
        """Start to count events and bytes. Earlier, a client could miss an event because it was not yet connected."""
        self._measuring = True
        self.events = self.bytes = 0

    async def publish(self, token: str | None, rate: float, stop: asyncio.Event) -> None:
        """Publish `rate` events per second to the channel until `stop` is set, and wait for the answers.

        Each event is sent on time, even if earlier POSTs are unanswered: a slow server must not get fewer requests.
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
            unanswered: set[asyncio.Task[None]] = set()
            due = time.perf_counter()
            while not stop.is_set():
                if len(unanswered) < _IN_FLIGHT:
                    post = posts.create_task(self._post(client))
                    unanswered.add(post)
                    post.add_done_callback(unanswered.discard)
                else:
                    self.skipped += 1
                due += 1 / rate
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), due - time.perf_counter())

    async def _post(self, client: httpx.AsyncClient) -> None:
        clients = self.open
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
        self.expected += clients
        self.answer.add(time.perf_counter() - sent)

    async def finish(self) -> None:
        """Stop counting, wait for published events that have not arrived, and close the connections."""
        self._measuring = False
        until = time.perf_counter() + _LAST_EVENTS_S
        while self.delivered < self.expected and time.perf_counter() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # setting an asyncio.Event at each delivery would cost more
        for client in list(self._clients):
            client.close()

    def take(self, event_id: str, data: str, now: float) -> None:
        """Count an event that a client received at `now`."""
        if data.startswith(self._mark):
            self.delivered += 1
            self.delivery.add(now - json.loads(data)["sent"])
        if not self._measuring:
            return
        self.events += 1
        first = self._first_arrival.get(event_id)
        if first is not None:
            self.spread.add(now - first)
        elif event_id:
            if len(self._first_arrival) >= _KNOWN_IDS:
                del self._first_arrival[next(iter(self._first_arrival))]
            self._first_arrival[event_id] = now

    def count_bytes(self, number: int) -> None:
        """Count bytes of body that a client received."""
        if self._measuring:
            self.bytes += number

    def discard(self, client: "_Client") -> None:
        """Forget a client that is closed."""
        self._clients.discard(client)


class _Client(asyncio.Protocol):
    """One connection and its stream.

    Args:
        load: Gets the measurements.
        ready: Resolved when the stream is open or has failed.
    """

    def __init__(self, load: Load, ready: asyncio.Future[None]) -> None:
        self.ready = ready
        self._load = load
        self._began = time.perf_counter()
        self._http = h11.Connection(h11.CLIENT)
        self._decoder = EventDecoder(max_event_bytes=_MAX_EVENT_BYTES)
        self._transport: asyncio.Transport | None = None
        self._open = self._had_event = self._closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast("asyncio.Transport", transport)
        if self._closed:  # the timeout was faster
            self._transport.abort()
            return
        request = self._http.send(self._load.request) or b""
        self._transport.write(request + (self._http.send(h11.EndOfMessage()) or b""))

    def data_received(self, data: bytes) -> None:
        """Parse a part of the response."""
        now = time.perf_counter()
        if self._closed:
            return
        try:
            self._http.receive_data(data)
            while not self._closed and self._take(self._http.next_event(), now):
                pass
        except h11.RemoteProtocolError as exc:
            self.fail("cut by the server" if not data else f"invalid HTTP: {exc}")
        except SSEError as exc:
            self.fail(str(exc))

    def eof_received(self) -> None:
        """Pass the end of the data to h11, which knows whether the body is complete."""
        self.data_received(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """Record the failure, unless the client was closed."""
        self.fail("cut by the server" if exc is None else _reason(exc))

    def _take(self, event: Any, now: float) -> bool:
        """Handle an event of h11; return whether there may be more."""
        if isinstance(event, h11.Response):
            self._take_response(event, now)
        elif isinstance(event, h11.Data):
            self._load.count_bytes(len(event.data))
            for message in self._decoder.feed(event.data):
                if not self._had_event:
                    self._had_event = True
                    self._load.first.add(now - self._began)
                self._load.take(message.id or "", message.data or "", now)
        elif isinstance(event, h11.EndOfMessage):
            self.fail("ended by the server")
        return event is not h11.NEED_DATA

    def _take_response(self, response: h11.Response, now: float) -> None:
        headers = dict(response.headers)
        content_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if response.status_code != 200:
            self.fail(f"answered {response.status_code}")
        elif content_type != b"text/event-stream":
            self.fail(f"not an event stream: {content_type.decode('latin-1') or 'no Content-Type'}")
        elif headers.get(b"content-encoding", b"identity") != b"identity":
            self.fail(f"encoded as {headers[b'content-encoding'].decode('latin-1')}")
        else:
            self._open = True
            self._load.opened += 1
            self._load.open += 1
            self._load.head.add(now - self._began)
            self._set_ready()

    def fail(self, kind: str) -> None:
        """Count a failure and close the connection, unless it is closed already."""
        if not self._closed:
            self._load.failed += 1
            self._load.errors[kind] += 1
            self.close()

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        self._load.open -= self._open
        self._open = False
        self._load.discard(self)
        self._set_ready()
        if self._transport is not None:
            self._transport.abort()

    def _set_ready(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)


def _reason(exc: Exception) -> str:
    """Return a short text that is the same for every connection: the messages of asyncio contain the address."""
    if isinstance(exc, OSError) and not isinstance(exc, ssl.SSLError) and exc.errno:
        return os.strerror(exc.errno).lower()
    return str(exc) or type(exc).__name__
