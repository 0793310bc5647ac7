"""Read an event stream of any server as EventSource does, across as many connections as it takes.

Rules: WHATWG HTML, 9.2.3 "Processing model". After failures, the standard lets a client wait longer each time.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Self

import httpx

from asgi_sse.errors import InvalidEventError, SSEError
from asgi_sse.protocol.decoder import EventDecoder
from asgi_sse.protocol.event import ServerSentEvent

_RETRY_S: Final = 3.0
"""Reconnection time of a stream that gives none: the default of browsers and of this library's streams."""

_LONGEST_RETRY_MS: Final = 86_400_000  # a day; a stream that asks for more has hardly meant it
_SHORTEST_PAUSE_S: Final = 0.1  # a stream that sends "retry: 0" and ends would get 500 requests per second
_LONGEST_PAUSE_S: Final = 60.0
"""Longest pause after repeated failures, unless the stream asks for a longer one."""

_CONNECT_TIMEOUT_S: Final = 10.0
_REASON_TIMEOUT_S: Final = 2.0
"""How long to wait for the body of an error response, which may never arrive."""

_MAX_EVENT_BYTES: Final = 64 * 1024 * 1024
_MAX_SHOWN_BYTES: Final = 500
_HTTP_WHITESPACE: Final = " \t\r\n"

_PERMANENT: Final = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.TooManyRedirects)
"""Errors that a new attempt would meet again."""


def ignore(_: str) -> None:
    """Drop a message."""


class StoppedError(SSEError):
    """The stream cannot continue; the message says why."""


class Follower:
    """The events of one URL, until the server answers 204. Use it as a context manager.

    Args:
        url: The URL of the stream.
        method: The method of the requests.
        headers: Headers of the requests.
        body: Body of the requests.
        last_event_id: The id of the event to start after.
        reconnect: Whether to reconnect when a connection ends or fails.
        read_timeout: Seconds without a byte after which a connection counts as failed; ``None``: no limit.
        on_status: Called with a message for people when a connection ends.
        on_detail: Called with a message for each connection, and with each comment and ``retry`` line.

    Attributes:
        last_event_id: The id of the last event.

    Raises:
        StoppedError: The environment names an invalid proxy or certificate file.
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
        read_timeout: float | None = None,
        on_status: Callable[[str], None] = ignore,
        on_detail: Callable[[str], None] = ignore,
    ) -> None:
        self.last_event_id: str = last_event_id
        self._url = url
        self._method = method
        # identity: a proxy that compresses could hold events back.
        self._headers = httpx.Headers(
            {"Accept": "text/event-stream", "Cache-Control": "no-store", "Accept-Encoding": "identity"}
        )
        self._headers.update(list(headers))
        self._body = body
        self._reconnect = reconnect
        self._on_status = on_status
        self._on_detail = on_detail
        self._retry_s = _RETRY_S
        self._failures = 0
        connect_timeout = _CONNECT_TIMEOUT_S if read_timeout is None else min(read_timeout, _CONNECT_TIMEOUT_S)
        self._timeout = httpx.Timeout(connect_timeout, read=read_timeout)
        try:
            self._client = httpx.Client(follow_redirects=True)
        except (ImportError, OSError, ValueError) as exc:  # a proxy or certificate file from the environment
            raise StoppedError(f"cannot send the request: {exc}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def __iter__(self) -> Iterator[ServerSentEvent]:
        """Yield the events as they arrive.

        Raises:
            StoppedError: The response is not an event stream, or the connection failed and `reconnect` is off.
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
                        self._on_status("the server answered 204: the stream is finished")
                        return
                    _check(response)
                    self._failures = 0
                    self._on_detail(f"connected to {response.url}")
                    yield from self._events(response)
                ended = "the stream ended"
            except (httpx.InvalidURL, UnicodeError, *_PERMANENT) as exc:  # UnicodeError: an invalid host name
                raise StoppedError(f"cannot send the request: {exc}") from None
            except httpx.RequestError as exc:
                ended = f"the connection failed: {str(exc) or type(exc).__name__}"
                if not self._reconnect:
                    raise StoppedError(ended) from None
                self._failures += 1
            if not self._reconnect:
                self._on_detail(ended)
                return
            pause = self._pause_s()
            self._on_status(f"{ended}; reconnecting in {pause:.1f} s")
            time.sleep(pause)

    def _request_headers(self) -> httpx.Headers:
        # The id is sent as UTF-8, without the whitespace that Fetch strips from a header value.
        last = self.last_event_id.strip(_HTTP_WHITESPACE).encode("utf-8", "surrogateescape")
        if not last:
            return self._headers
        others = [(name, value) for name, value in self._headers.raw if name.lower() != b"last-event-id"]
        return httpx.Headers([*others, (b"last-event-id", last)])

    def _events(self, response: httpx.Response) -> Iterator[ServerSentEvent]:
        decoder = EventDecoder(max_event_bytes=_MAX_EVENT_BYTES)
        decoder.last_event_id = self.last_event_id
        details = _Details(self._on_detail)
        try:
            for chunk in response.iter_bytes():
                details.feed(chunk)
                events = decoder.feed(chunk)
                if decoder.retry is not None:
                    self._retry_s = min(decoder.retry, _LONGEST_RETRY_MS) / 1000
                for event in events:
                    self.last_event_id = event.id or ""
                    yield event
                self.last_event_id = decoder.last_event_id  # a block without data can set the id too
        except InvalidEventError as exc:
            raise StoppedError(str(exc)) from None

    def _pause_s(self) -> float:
        """Return the seconds to wait before the next connection."""
        retry = max(self._retry_s, _SHORTEST_PAUSE_S)
        if not self._failures:
            return retry
        doubled = retry * 2.0 ** min(self._failures - 1, 20)
        pause = min(doubled, max(self._retry_s, _LONGEST_PAUSE_S))
        return pause * random.uniform(0.5, 1)  # noqa: S311 (clients that were cut together reconnect apart)


def _check(response: httpx.Response) -> None:
    """Raise unless `response` is an event stream.

    Raises:
        StoppedError: The response is not an event stream; a new attempt is not expected to change that.
    """
    if response.status_code != 200:
        text = _reason(response)
        phrase = f"{response.status_code} {response.reason_phrase}".strip()
        raise StoppedError(f"the server answered {phrase}{': ' if text else ''}{text}")
    content_type = response.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "text/event-stream":
        raise StoppedError(f"Content-Type must be text/event-stream, got {content_type!r}")


def _reason(response: httpx.Response) -> str:
    """Return the start of an error's body, or an empty string if none arrives in time."""
    response.request.extensions["timeout"]["read"] = _REASON_TIMEOUT_S
    try:
        body = next(response.iter_bytes(), b"")
    except httpx.RequestError:
        body = b""
    return " ".join(body[:_MAX_SHOWN_BYTES].decode("utf-8", "replace").split())


class _Details:
    """Finds the comments and ``retry`` lines of a stream, which a decoder does not return."""

    def __init__(self, on_detail: Callable[[str], None]) -> None:
        self._on_detail = on_detail
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        """Report the lines that `chunk` completes."""
        *lines, rest = (self._rest + chunk).replace(b"\r", b"\n").split(b"\n")
        self._rest = rest[:_MAX_SHOWN_BYTES]
        for line in lines:
            if line.startswith((b":", b"retry:")):
                self._on_detail(line.decode("utf-8", "replace"))
