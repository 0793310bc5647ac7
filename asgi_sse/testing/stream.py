"""`open_stream`: one request to an app, and its response event by event, as a client sees it."""

import json as json_module
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from types import EllipsisType
from typing import Any, Final, cast
from urllib.parse import unquote

import anyio

from asgi_sse.errors import StreamClosedError, short_repr
from asgi_sse.protocol.asgi import ASGIApp, Scope
from asgi_sse.protocol.decoder import EventDecoder
from asgi_sse.protocol.event import ServerSentEvent

from .app_task import DEFAULT_TIMEOUT_S, check_app
from .matching import describe_expected, differing_field
from .request import AppRequest

_SHOWN_EVENTS: Final = 5
"""The number of earlier events that a failure shows."""

_SHOWN_BYTES: Final = 200
"""The number of bytes after the last event that a failure shows."""


class OpenStream(AppRequest):
    """A response in progress, as a client sees it. `open_stream` makes it.

    Iterate over it to get all events until the end of the body, without a timeout.

    Attributes:
        status: The status of the response.
        headers: The response headers, with lower-case names. A repeated name has its last value.
        raw_headers: The response headers as the app sent them: pairs of bytes.
        complete: Whether the body has ended properly. Otherwise a server would cut the connection.
        retry: The reconnection time in milliseconds that the stream sent last, or ``None``.
        last_event_id: What the client would now send as ``Last-Event-ID``.
    """

    def __init__(
        self, app: ASGIApp, scope: Scope, body: bytes, capacity: int, timeout: float = DEFAULT_TIMEOUT_S
    ) -> None:
        super().__init__(app, scope, body, capacity, timeout)
        self._decoder = EventDecoder()
        self._events: deque[ServerSentEvent] = deque()
        self._received_id = ""
        self._shown: deque[ServerSentEvent] = deque(maxlen=_SHOWN_EVENTS)
        self._undecoded = b""  # the end of what came since the last event

    @property
    def retry(self) -> int | None:
        """The reconnection time in milliseconds that the stream sent last, or ``None``."""
        return self._decoder.retry

    @property
    def last_event_id(self) -> str:
        """What the client would now send as ``Last-Event-ID``."""
        # The decoder is ahead if several events came in one chunk and the test has not received all of them.
        return self._received_id if self._events else self._decoder.last_event_id

    async def receive(self, timeout: float = 1.0) -> ServerSentEvent:
        """Return the next event.

        Args:
            timeout: Seconds to wait for it.

        Raises:
            TimeoutError: No event came in time.
            StreamClosedError: The stream has ended.
            Exception: What the app raised.
        """
        event = await self._try_receive(timeout)
        if isinstance(event, Exception):
            raise event
        return event

    async def _try_receive(self, timeout: float) -> ServerSentEvent | TimeoutError | StreamClosedError:
        """Return the next event, or the error that says why none came. So only the app's own errors are raised."""
        deadline = anyio.current_time() + timeout
        while not self._events:
            id_before = self._decoder.last_event_id
            chunk = await self.try_read(deadline - anyio.current_time())
            if isinstance(chunk, TimeoutError):
                return TimeoutError(f"no event came within {timeout:g} s{self.describe_progress()}")
            if not chunk:
                end = "has ended" if self.complete else "was cut"
                return StreamClosedError(f"the body {end}; no event is left{self.describe_progress()}")
            self._events.extend(self._decoder.feed(chunk))
            self._received_id = id_before
            self._undecoded = b"" if self._events else (self._undecoded + chunk)[-_SHOWN_BYTES:]
        event = self._events.popleft()
        self._received_id = event.id or ""
        self._shown.append(event)
        return event

    async def receive_json(self, timeout: float = 1.0) -> Any:
        """Return the data of the next event, decoded as JSON.

        Args:
            timeout: Seconds to wait for the event.

        Raises:
            AssertionError: The data is not JSON.
            TimeoutError: No event came in time.
            StreamClosedError: The stream has ended.
            Exception: What the app raised.
        """
        event = await self.receive(timeout)
        try:
            return json_module.loads(event.data or "")
        except ValueError as exc:
            raise AssertionError(
                f"the data must be JSON, got {event!r} ({exc}); receive() returns it as text"
            ) from None

    async def collect(self, count: int, timeout: float = 1.0) -> list[ServerSentEvent]:
        """Return the next `count` events.

        For all events until the end, write ``[event async for event in stream]``.

        Args:
            count: The number of events.
            timeout: Seconds to wait for all of them together.

        Raises:
            AssertionError: Fewer events came in time, or before the end.
            Exception: What the app raised.
        """
        events: list[ServerSentEvent] = []
        deadline = anyio.current_time() + timeout
        while len(events) < count:
            match await self._try_receive(max(deadline - anyio.current_time(), 0)):
                case TimeoutError():
                    raise AssertionError(
                        f"{len(events)} of {count} events came within {timeout:g} s{self.describe_progress()}"
                    )
                case StreamClosedError() as end:
                    raise AssertionError(f"{len(events)} of {count} events came: {end}")
                case event:
                    events.append(event)
        return events

    def __aiter__(self) -> AsyncIterator[ServerSentEvent]:
        return self

    async def __anext__(self) -> ServerSentEvent:
        try:
            return await self.receive(timeout=float("inf"))
        except StreamClosedError:
            raise StopAsyncIteration from None

    async def expect(
        self,
        data: Any = ...,
        *,
        event: str | EllipsisType = ...,
        id: str | int | EllipsisType = ...,  # noqa: A002 (the field's name in the standard)
        timeout: float = 1.0,
    ) -> ServerSentEvent:
        """Receive the next event and check it. What you leave out may have any value.

        Args:
            data: Its data. A ``str`` is compared as text, any other value as JSON.
            event: Its type, which is ``"message"`` for an event without one.
            id: The last event id after the event, which an event without an id takes from an earlier one.
            timeout: Seconds to wait for the event.

        Returns:
            The event.

        Raises:
            AssertionError: The event differs, none came in time, or the stream has ended.
            Exception: What the app raised.
        """
        expected = describe_expected(data, event, id)
        match await self._try_receive(timeout):
            case Exception() as error:
                raise AssertionError(f"expected {expected}: {error}")
            case received:
                field = differing_field(received, data, event, id)
        if field:
            self._shown.pop()
            raise AssertionError(
                f"expected {expected}; the next event is {received!r}: its {field} differs{self.describe_progress()}"
            )
        return received

    async def expect_nothing(self, seconds: float) -> None:
        """Check that no event comes for `seconds` and that the stream stays open. Comments may come.

        Args:
            seconds: The time to wait.

        Raises:
            AssertionError: An event came, or the stream has ended.
            Exception: What the app raised.
        """
        match await self._try_receive(seconds):
            case TimeoutError():
                return
            case StreamClosedError() as end:
                raise AssertionError(f"expected nothing for {seconds:g} s: {end}")
            case event:
                self._shown.pop()
                raise AssertionError(f"expected nothing for {seconds:g} s; {event!r} came{self.describe_progress()}")

    async def expect_end(self, timeout: float = 1.0) -> None:
        """Check that no further event comes and that the body ends properly.

        Args:
            timeout: Seconds to wait for the end.

        Raises:
            AssertionError: An event came, the stream goes on, or its body was cut.
            Exception: What the app raised.
        """
        match await self._try_receive(timeout):
            case TimeoutError() as error:
                raise AssertionError(f"expected the end of the body; it goes on: {error}")
            case StreamClosedError():
                if not self.complete:
                    raise AssertionError(
                        "expected the end of the body; the app returned without it, so a server cuts the connection: "
                        f"send a last http.response.body without more_body{self.describe_progress()}"
                    )
            case event:
                self._shown.pop()
                raise AssertionError(f"expected the end of the body; {event!r} came{self.describe_progress()}")

    def describe_progress(self) -> str:
        """Return what a failure says about the response and its events so far."""
        text = super().describe_progress()
        if self._undecoded:
            text += f"; the last bytes are not a complete event: {self._undecoded!r}"
        if self._shown:
            text += f"; the last events before: {', '.join(map(repr, self._shown))}"
        return text

    @asynccontextmanager
    async def reconnect(self) -> "AsyncIterator[OpenStream]":
        """Disconnect and repeat the request with ``Last-Event-ID``, as an EventSource does.

        The new request is sent at once, without waiting for the reconnection time (`retry`).

        Yields:
            The new response.

        Raises:
            AssertionError: An EventSource would not reconnect after this response, or the app breaks one of the
                rules of `open_stream`.
            TimeoutError: The new response start did not come in time.
            Exception: What the app raised.
        """
        if self.status != 200 or not self.headers.get("content-type", "").startswith("text/event-stream"):
            raise AssertionError(
                f"an EventSource does not reconnect after {self!r}: it fails for good unless the response is a 200 "
                "with content-type text/event-stream. For a client that reconnects all the same, call open_stream() "
                "again"
            )
        await self.disconnect()
        headers = [(name, value) for name, value in self._scope["headers"] if name != b"last-event-id"]
        if self.last_event_id:
            headers.append((b"last-event-id", self.last_event_id.encode()))
        scope = {**self._scope, "headers": headers}
        async with _run_request(
            OpenStream(self._app, scope, self._request_body, self._capacity, self._timeout)
        ) as stream:
            yield stream


@asynccontextmanager
async def _run_request(stream: OpenStream) -> AsyncIterator[OpenStream]:
    stream.start()
    try:
        await stream.wait_for_start_in_time()
        yield stream
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            try:
                await stream.disconnect()
            except Exception as exc:
                error.add_note(f"While leaving {stream!r}: {type(exc).__name__}: {exc}")
        raise
    with anyio.CancelScope(shield=True):
        await stream.disconnect()


@asynccontextmanager
async def open_stream(
    app: ASGIApp,
    path: str = "/",
    *,
    method: str = "GET",
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    json: Any = ...,
    capacity: int = 16,
    timeout: float = DEFAULT_TIMEOUT_S,
    scope: Mapping[str, Any] | None = None,
) -> AsyncIterator[OpenStream]:
    """Send a request to `app` and enter the block as soon as the response start is there.

    When the block ends, the client disconnects, and the app has to return.

    Args:
        app: Any ASGI app.
        path: The path of the request, with a query if there is one.
        method: The method of the request. Default: GET.
        headers: The headers of the request.
        body: The body of the request.
        json: A JSON value to send as the body, in place of `body`, with its ``content-type``.
        capacity: The number of unread body messages at which the app's ``send`` waits, as it does for a slow client.
            Default: 16. A test that never reads is a client that never reads.
        timeout: Seconds of real time for the response start, and for the app's return after the disconnect.
            Default: 15.
        scope: More entries for the ASGI scope, or other values for its usual entries.

    Yields:
        The response.

    Raises:
        TypeError: `app` is not callable, or `body` is not bytes.
        ValueError: `path`, `capacity` or a header is invalid.
        TimeoutError: The response start did not come in time.
        AssertionError: The app returned without a response, or did not return after its client left.
        Exception: What the app raised: at once before the response start, else from the next read, and at the latest
            when the block ends.
    """
    raw_path, _, query = path.partition("?")
    pairs = list(cast("Mapping[str, str]", headers).items() if isinstance(headers, Mapping) else headers)
    check_app(app)
    if not path.startswith("/"):
        raise ValueError(f"path must begin with '/', got {path!r}; leave out the scheme and the host")
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 message, got {capacity!r}; otherwise no response fits")
    if json is not ...:
        body = json_module.dumps(json).encode()
        pairs.append(("content-type", "application/json"))
    if not isinstance(body, bytes):
        raise TypeError(f"body must be bytes, got {type(body).__name__} {short_repr(body)}; pass a JSON value as json=")
    full_scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [_encode_header(name, value) for name, value in pairs],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 80),
        **(scope or {}),
    }
    async with _run_request(OpenStream(app, full_scope, body, capacity, timeout)) as stream:
        yield stream


def _encode_header(name: str, value: str) -> tuple[bytes, bytes]:
    try:
        return name.lower().encode("latin-1"), value.encode("latin-1")
    except (AttributeError, UnicodeEncodeError):
        raise ValueError(
            f"a header must be two str of Latin-1 characters, got {short_repr(name)}: {short_repr(value)}; for UTF-8, "
            "which browsers send in Last-Event-ID, pass value.encode().decode('latin-1')"
        ) from None
