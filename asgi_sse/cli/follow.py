"""`Follower`: reads a stream of any server as an EventSource does, over as many connections as it takes.

Rules: WHATWG HTML, 9.2.3 "Processing model". The reconnection time grows after failures, which that leaves to clients.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Self

import httpx

from asgi_sse.errors import InvalidEventError, SSEError
from asgi_sse.protocol.decoder import EventDecoder
from asgi_sse.protocol.event import ServerSentEvent

_RETRY: Final = 3.0
"""Seconds until it reconnects, where the stream does not say: what this library's streams say, and browsers have."""

_LONGEST_RETRY: Final = 86_400_000  # of milliseconds: a day, beyond which a stream hardly means what it says
_LEAST_PAUSE: Final = 0.1  # a stream that says "retry: 0", and ends, would be asked for 500 times a second
_LONGEST_PAUSE: Final = 60.0
"""Seconds, behind many failures; a stream may ask for more."""

_CONNECT_TIMEOUT: Final = 10.0
_REASON_TIMEOUT: Final = 2.0
"""Seconds for what an answer that is no stream says, which may never come."""

_MAX_EVENT: Final = 64 * 1024 * 1024
_MAX_SHOWN: Final = 500
_WHITESPACE: Final = " \t\r\n"  # of HTTP


_FOR_GOOD: Final = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.TooManyRedirects)


def ignore(_: str) -> None:
    """Nobody is to know."""


class StoppedError(SSEError):
    """The stream will not go on, and why."""


class Follower:
    """The events of one URL, until the server says that there are no more. To be entered.

    Args:
        url: The URL.
        method: Of its requests.
        headers: Of its requests.
        body: Of its requests; it may not be with GET.
        last_event_id: Where to begin: behind the event of that id.
        reconnect: Whether to go on when a connection has ended.
        silence: Seconds without a byte after which a connection is taken to be dead; ``None``: never.
        told: Called with why a connection has ended, for people.
        detailed: Called with what is connected, and with each line that is a comment or a ``retry``.

    Attributes:
        last_event_id: That of the last event.

    Raises:
        StoppedError: The environment names a proxy, or certificates, that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: bytes | None = None,
        last_event_id: str = "",
        reconnect: bool = True,
        silence: float | None = None,
        told: Callable[[str], None] = ignore,
        detailed: Callable[[str], None] = ignore,
    ) -> None:
        self.last_event_id = last_event_id
        self._url = url
        self._method = method
        # identity: a compressor on the way could hold events back.
        self._headers = httpx.Headers(
            {"Accept": "text/event-stream", "Cache-Control": "no-store", "Accept-Encoding": "identity"}
        )
        self._headers.update(list(headers))
        self._body = body
        self._reconnect = reconnect
        self._told = told
        self._detailed = detailed
        self._retry = _RETRY
        self._failures = 0
        connecting = _CONNECT_TIMEOUT if silence is None else min(silence, _CONNECT_TIMEOUT)
        self._timeout = httpx.Timeout(connecting, read=silence)
        try:
            self._client = httpx.Client(follow_redirects=True)
        except (ImportError, OSError, ValueError) as exc:  # of a proxy, or certificates, that the environment names
            raise StoppedError(f"the request cannot be made: {exc}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def __iter__(self) -> Iterator[ServerSentEvent]:
        """The events as they come.

        Raises:
            StoppedError: The server's answer is none that goes on, or the connection failed and may not be made again.
        """
        while True:
            try:
                with self._client.stream(
                    self._method,
                    self._url,
                    headers=self._request_headers(),
                    content=self._body,
                    extensions={"timeout": self._timeout.as_dict()},
                ) as response:
                    if response.status_code == 204:
                        self._told("the server says that there is no more (204)")
                        return
                    _check(response)
                    self._failures = 0
                    self._detailed(f"connected to {response.url}")
                    yield from self._events(response)
                ended = "the stream has ended"
            except (httpx.InvalidURL, UnicodeError, *_FOR_GOOD) as exc:  # UnicodeError: of a host's name
                raise StoppedError(f"the request cannot be made: {exc}") from None
            except httpx.RequestError as exc:
                ended = f"the connection failed: {str(exc) or type(exc).__name__}"
                if not self._reconnect:
                    raise StoppedError(ended) from None
                self._failures += 1
            if not self._reconnect:
                self._detailed(ended)
                return
            pause = self._pause()
            self._told(f"{ended}; again in {pause:.1f} s")
            time.sleep(pause)

    def _request_headers(self) -> httpx.Headers:
        # As UTF-8, and as Fetch normalises a header's value.
        last = self.last_event_id.strip(_WHITESPACE).encode("utf-8", "surrogateescape")
        if not last:
            return self._headers
        given = [(name, value) for name, value in self._headers.raw if name.lower() != b"last-event-id"]
        return httpx.Headers([*given, (b"last-event-id", last)])

    def _events(self, response: httpx.Response) -> Iterator[ServerSentEvent]:
        decoder = EventDecoder(max_event_bytes=_MAX_EVENT)
        decoder.last_event_id = self.last_event_id
        details = _Details(self._detailed)
        try:
            for chunk in response.iter_bytes():
                details.feed(chunk)
                events = decoder.feed(chunk)
                if decoder.retry is not None:
                    self._retry = min(decoder.retry, _LONGEST_RETRY) / 1000
                for event in events:
                    self.last_event_id = event.id or ""
                    yield event
                self.last_event_id = decoder.last_event_id  # a block without data has one as well
        except InvalidEventError as exc:
            raise StoppedError(str(exc)) from None

    def _pause(self) -> float:
        if not self._failures:
            return max(self._retry, _LEAST_PAUSE)
        growing = max(self._retry, _LEAST_PAUSE) * 2.0 ** min(self._failures - 1, 20)
        pause = min(growing, max(self._retry, _LONGEST_PAUSE))
        return pause * random.uniform(0.5, 1)  # noqa: S311 (it spreads those who were cut at the same time)


def _check(response: httpx.Response) -> None:
    """See that the answer is a stream.

    Raises:
        StoppedError: It is another one, of which nothing is expected to change.
    """
    if response.status_code != 200:
        text = _reason(response)
        phrase = f"{response.status_code} {response.reason_phrase}".strip()
        raise StoppedError(f"the server answered {phrase}{': ' * bool(text)}{text}")
    kind = response.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "text/event-stream":
        raise StoppedError(f"that is no event stream, its Content-Type is {kind!r}")


def _reason(response: httpx.Response) -> str:
    """The beginning of what it says, if that comes: what is to be done is told by its status alone."""
    response.request.extensions["timeout"]["read"] = _REASON_TIMEOUT
    try:
        body = next(response.iter_bytes(), b"")
    except httpx.RequestError:
        body = b""
    return " ".join(body[:_MAX_SHOWN].decode("utf-8", "replace").split())


class _Details:
    """What a decoder gives to nobody: comments, and reconnection times."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        *lines, rest = (self._rest + chunk).replace(b"\r", b"\n").split(b"\n")
        self._rest = rest[:_MAX_SHOWN]
        for line in lines:
            if line.startswith((b":", b"retry:")):
                self._told(line.decode("utf-8", "replace"))
