"""`open_stream`: one request against an app, and its response as a client sees it, event by event."""

import json
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import unquote

import anyio
import anyio.lowlevel

from asgi_sse.errors import StreamClosedError, short_repr
from asgi_sse.protocol.asgi import ASGIApp, Message, Scope
from asgi_sse.protocol.decoder import EventDecoder
from asgi_sse.protocol.event import ServerSentEvent
from asgi_sse.runtime.current import current_loop

from .clock import real_deadline

if TYPE_CHECKING:
    from asgi_sse.runtime.base import Child

_SHOWN: Final = 5
"""Events, of those received before, that a failure shows."""

PATIENCE: Final = 15.0
"""Seconds of real time for the head, and for the app's return when its client has left: more than the default
``cleanup_timeout``."""

_LAST_CALL: Final = 1.0
"""Seconds of real time in which an app that did not return obeys its cancellation."""

open_streams: Final["weakref.WeakSet[OpenStream]"] = weakref.WeakSet()
"""Those whose app has not returned, for who has to say what a test hangs on."""


class OpenStream:
    """A response under way, as a client sees it. Made by `open_stream`.

    Iterating gives the events until the end of the body, however long they take.

    Attributes:
        status: The response's status.
        headers: Its headers, names in lower case; the last value of a name that comes twice.
        raw_headers: Its headers as the app sent them: pairs of bytes.
        complete: Whether the body has ended properly. A server would cut the connection of one that
            has not.
        retry: The reconnection time in milliseconds that the stream asked for last.
        last_event_id: What a client that has got as far would send as ``Last-Event-ID``.
    """

    def __init__(self, app: ASGIApp, scope: Scope, body: bytes, capacity: int, timeout: float = PATIENCE) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.raw_headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self._request = (app, scope, body, capacity, timeout)
        self._body: bytes | None = body
        self._messages: deque[Message] = deque()
        self._changed = anyio.Event()
        self._disconnected = False
        self._answered = False  # to the end of the body, which may not be read yet
        self._returned = False
        self._gave_up = False  # a send for which there was no room
        self._child: Child | None = None
        self._error: BaseException | None = None  # of the app, until it is raised
        self._raised = 0  # its id: who keeps an error keeps the frames that it came through
        self._decoder = EventDecoder()
        self._events: deque[ServerSentEvent] = deque()
        self._received_id = ""
        self._shown: deque[ServerSentEvent] = deque(maxlen=_SHOWN)
        self._between = b""  # what came since the last event, and is none

    def __repr__(self) -> str:
        scope = self._request[1]
        state = "ended" if self.complete else "returned" if self._returned else "open"
        if self._gave_up:
            state += f", dropped while it had as many unread messages as capacity={self._request[3]} allows"
        return f"<OpenStream {scope['method']} {scope['path']} {self.status or 'no response yet'} {state}>"

    @property
    def retry(self) -> int | None:
        """See the class."""
        return self._decoder.retry

    @property
    def last_event_id(self) -> str:
        """See the class."""
        # The decoder is ahead where events came in one piece and were not all received.
        return self._received_id if self._events else self._decoder.last_event_id

    # Reading

    async def read(self, timeout: float = 1.0) -> bytes:
        """The next piece of the body as the app sent it; ``b""`` at its end.

        Its events are not received any more. Comments, as keep-alives are, can be seen in this way alone.

        Raises:
            TimeoutError: None came within `timeout` seconds.
            Exception: What the app raised.
        """
        try:
            with anyio.fail_after(timeout):
                while not self.complete:
                    if not self._messages:
                        if self._returned:
                            break
                        await self._changed.wait()
                        continue
                    message = self._messages.popleft()
                    self._notify()
                    self.complete = not message.get("more_body", False)
                    if message.get("body"):
                        return bytes(message["body"])
        except TimeoutError:
            raise TimeoutError(f"nothing came within {timeout:g} s{self._so_far()}") from None
        self._raise_error()
        return b""

    async def receive(self, timeout: float = 1.0) -> ServerSentEvent:
        """The next event.

        Raises:
            TimeoutError: None came within `timeout` seconds.
            StreamClosedError: The stream has ended.
            Exception: What the app raised.
        """
        began = anyio.current_time()
        while not self._events:
            before = self._decoder.last_event_id
            try:
                chunk = await self.read(began + timeout - anyio.current_time())
            except TimeoutError as exc:
                if self.raised(exc):
                    raise
                raise TimeoutError(f"no event came within {timeout:g} s{self._so_far()}") from None
            if not chunk:
                raise StreamClosedError(
                    f"the body has ended{'' if self.complete else ', cut'}; there is no event more{self._so_far()}"
                )
            self._events.extend(self._decoder.feed(chunk))
            self._received_id = before
            self._between = b"" if self._events else (self._between + chunk)[-200:]
        event = self._events.popleft()
        self._received_id = event.id or ""
        self._shown.append(event)
        return event

    async def receive_json(self, timeout: float = 1.0) -> Any:
        """The data of the next event, which is JSON.

        Raises:
            AssertionError: It is not.
            Exception: As `receive`.
        """
        event = await self.receive(timeout)
        try:
            return json.loads(event.data or "")
        except ValueError as exc:
            raise AssertionError(f"{event!r} has data that is no JSON ({exc}); receive() gives it as text") from None

    async def collect(self, count: int, timeout: float = 1.0) -> list[ServerSentEvent]:
        """The next `count` events.

        All events up to the end are ``[event async for event in stream]``.

        Raises:
            AssertionError: Fewer came within `timeout` seconds, or before the end.
            Exception: What the app raised.
        """
        events: list[ServerSentEvent] = []
        deadline = anyio.current_time() + timeout
        while len(events) < count:
            try:
                events.append(await self.receive(max(deadline - anyio.current_time(), 0)))
            except (TimeoutError, StreamClosedError) as exc:
                if self.raised(exc):
                    raise
                why = f" within {timeout:g} s{self._so_far()}" if isinstance(exc, TimeoutError) else f": {exc}"
                raise AssertionError(f"{len(events)} of {count} events came{why}") from None
        return events

    def __aiter__(self) -> AsyncIterator[ServerSentEvent]:
        return self

    async def __anext__(self) -> ServerSentEvent:
        try:
            return await self.receive(timeout=float("inf"))
        except StreamClosedError:
            raise StopAsyncIteration from None

    # Assertions

    async def expect(
        self,
        data: Any = ...,
        *,
        event: str | EllipsisType = ...,
        id: str | int | EllipsisType = ...,  # noqa: A002 (the field's name in the standard)
        timeout: float = 1.0,
    ) -> ServerSentEvent:
        """The next event, which has to be this one. What is not given may be anything.

        Args:
            data: Its data: a ``str`` as it is, any other JSON value as the data means it.
            event: Its type; ``"message"`` if it has none.
            id: The last event id as of that event, as a client has it: that of an earlier event if it has none.
            timeout: Seconds to wait for it.

        Raises:
            AssertionError: Another one came, or none, or the stream has ended.
            Exception: What the app raised.
        """
        try:
            received = await self.receive(timeout)
        except (TimeoutError, StreamClosedError) as exc:
            if self.raised(exc):
                raise
            raise AssertionError(f"expected {_expected(data, event, id)}: {exc}") from None
        differing = _differing(received, data, event, id)
        if differing:
            self._shown.pop()
            raise AssertionError(
                f"expected {_expected(data, event, id)}; the next event is {received!r}: its {differing} differs"
                f"{self._so_far()}"
            )
        return received

    async def expect_nothing(self, seconds: float) -> None:
        """For so long no event comes, and the stream stays open. Comments may come.

        Raises:
            AssertionError: One came, or the stream has ended.
            Exception: What the app raised.
        """
        try:
            event = await self.receive(seconds)
        except StreamClosedError as exc:
            if self.raised(exc):
                raise
            raise AssertionError(f"expected nothing for {seconds:g} s: {exc}") from None
        except TimeoutError as exc:
            if self.raised(exc):
                raise
            return
        self._shown.pop()
        raise AssertionError(f"expected nothing for {seconds:g} s; {event!r} came{self._so_far()}")

    async def expect_end(self, timeout: float = 1.0) -> None:
        """No event comes any more, and the body ends properly.

        Raises:
            AssertionError: An event came, or the stream goes on, or its body was cut.
            Exception: What the app raised.
        """
        try:
            event = await self.receive(timeout)
        except StreamClosedError as exc:
            if self.raised(exc):
                raise
            if not self.complete:
                raise AssertionError(
                    "expected the end of the body; the app returned without it, at which a server cuts the "
                    f"connection: send a last http.response.body without more_body{self._so_far()}"
                ) from None
            return
        except TimeoutError as exc:
            if self.raised(exc):
                raise
            raise AssertionError(f"expected the end of the body; it goes on: {exc}") from None
        self._shown.pop()
        raise AssertionError(f"expected the end of the body; {event!r} came{self._so_far()}")

    def _so_far(self) -> str:
        """What a failure says of the stream."""
        text = f". {self!r}"
        kind = self.headers.get("content-type", "")
        if self.status != 200 or not kind.startswith("text/event-stream"):
            text += f", which is no event stream: its content-type is {kind or 'missing'}"
        if self._between:
            text += f"; what came last is no event, or not a whole one: {self._between!r}"
        if self._shown:
            text += f"; the last events before: {', '.join(map(repr, self._shown))}"
        return text

    def raised(self, exc: BaseException) -> bool:
        """Whether it is what the app raised: a TimeoutError of its own is for the test to see as it is."""
        return id(exc) == self._raised

    # Leaving and coming back

    async def disconnect(self) -> None:
        """Leave, as a client that closes its connection, and wait until the app has returned.

        Raises:
            AssertionError: It did not return within the ``timeout`` of `open_stream`, and was cancelled.
            Exception: What the app raised.
        """
        self._disconnected = True
        self._notify()
        patience = self._request[4]
        if not await self._has_returned(patience) and self._child is not None:
            shown = repr(self)  # of now: once cancelled it says that the app has returned
            self._child.cancel()
            if not await self._has_returned(_LAST_CALL):
                self._child.force_cancel()
            raise AssertionError(
                f"the app has not returned {patience:g} s after its client has left: {shown}. It has to end when "
                "receive() gives http.disconnect, as an EventSourceResponse does"
            )
        self._raise_error()

    @asynccontextmanager
    async def reconnect(self) -> "AsyncIterator[OpenStream]":
        """Leave, and make the same request again with ``Last-Event-ID``, as an EventSource does.

        At once: the reconnection time (`retry`) is not waited for.

        Yields:
            The new response.

        Raises:
            AssertionError: No EventSource would come back to this response.
            Exception: As `open_stream`.
        """
        app, scope, body, capacity, timeout = self._request
        if self.status != 200 or not self.headers.get("content-type", "").startswith("text/event-stream"):
            raise AssertionError(
                f"an EventSource does not come back to {self!r}: it fails for good unless the response is a 200 of "
                "text/event-stream. For a client that does, call open_stream() again"
            )
        await self.disconnect()
        headers = [(name, value) for name, value in scope["headers"] if name != b"last-event-id"]
        if self.last_event_id:
            headers.append((b"last-event-id", self.last_event_id.encode()))
        async with opened(OpenStream(app, {**scope, "headers": headers}, body, capacity, timeout)) as stream:
            yield stream

    # The server's side

    def start(self) -> None:
        """Run the app, in a task of its own."""
        # Of the event loop's, not of a group: a fixture's end may run in another task than its beginning.
        self._child = current_loop().spawn(self._run, f"asgi_sse.testing {self._request[1]['path']}")

    async def wait_for_head(self) -> None:
        """Wait until the app has sent the head.

        Raises:
            AssertionError: It returned without.
            Exception: What it raised.
        """
        while not (self.status or self._returned):
            await self._changed.wait()
        if not self.status:
            self._raise_error()
            raise AssertionError("the app returned without a response")

    async def wait_for_head_in_time(self) -> None:
        """As `wait_for_head`.

        Raises:
            TimeoutError: It took longer than the ``timeout`` of `open_stream`.
        """
        patience = self._request[4]
        with real_deadline(patience) as deadline:
            await self.wait_for_head()
        if deadline.cancelled_caught:  # maybe since the process was held up, before the app had its first step
            await anyio.lowlevel.checkpoint()
        if deadline.cancelled_caught and not (self.status or self._returned):
            raise TimeoutError(
                f"the app has sent no head within {patience:g} s: {self!r}. Give open_stream() another timeout if it "
                "may take longer"
            )
        await self.wait_for_head()  # it may have come in the very turn of the deadline

    async def _has_returned(self, timeout: float) -> bool:
        with real_deadline(timeout):
            while not self._returned:
                await self._changed.wait()
        return self._returned

    async def _run(self) -> None:
        app, scope = self._request[:2]
        open_streams.add(self)
        try:
            await app(dict(scope, headers=list(scope["headers"])), self._receive, self._send)
        except GeneratorExit:  # its event loop was closed under it, which who waits could not be told in
            open_streams.discard(self)
            raise
        except anyio.get_cancelled_exc_class():
            self._return()
            raise
        except BaseException as exc:  # for the test to see, not for the event loop
            self._error = exc
        self._return()

    def _return(self) -> None:
        open_streams.discard(self)
        self._returned = True
        self._notify()

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        while not (self._disconnected or self._answered):
            await self._changed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        # Like every server: without waiting while there is room, and to nobody without complaint.
        capacity = self._request[3]
        while len(self._messages) >= capacity and not self._disconnected:
            try:
                await self._changed.wait()
            except BaseException:
                self._gave_up = not self._disconnected  # else it is the client who has left
                raise
        self._gave_up = False  # there is room: it has tried again
        if self._disconnected:
            return
        self._check(message["type"])
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.raw_headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.raw_headers}
        elif message["type"] == "http.response.body":
            self._messages.append(message)
            self._answered = not message.get("more_body", False)
        self._notify()

    def _check(self, kind: str) -> None:
        """See that a message has its place in a response: servers raise otherwise, and cut the connection.

        Raises:
            RuntimeError: It has none.
        """
        begun = self.status > 0
        if kind in ("http.response.start", "http.response.body") and begun != (kind == "http.response.body"):
            raise RuntimeError(f"the app sent {kind} {'twice' if begun else 'before http.response.start'}: {self!r}")
        if kind == "http.response.body" and self._answered:
            raise RuntimeError(f"the app sent {kind} behind the last one, which has no more_body: {self!r}")

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._raised = id(error)
            raise error


@asynccontextmanager
async def opened(stream: OpenStream) -> AsyncIterator[OpenStream]:
    """Run the request of `stream`, as `open_stream` does."""
    stream.start()
    try:
        await stream.wait_for_head_in_time()
        yield stream
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            try:
                await stream.disconnect()
            except Exception as exc:
                error.add_note(f"And on leaving {stream!r}: {type(exc).__name__}: {exc}")
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
    timeout: float = PATIENCE,
    scope: Mapping[str, Any] | None = None,
) -> AsyncIterator[OpenStream]:
    """Run a request against `app`, and give its response as soon as the head is there.

    On leaving, the client disconnects, and the app has to return.

    Args:
        app: Any ASGI app.
        path: The path to ask for, with a query if there is one.
        method: The method.
        headers: The request's headers.
        body: The request's body.
        json: The request's body as a JSON value, in place of `body`; its ``content-type`` is sent with it.
        capacity: Body messages that fit between app and client: when they are unread, the app's
            ``send`` waits, as it does for a slow client. One that does not read at all is a test
            that does not.
        timeout: Seconds of real time for the head, and for the app's return on leaving.
        scope: More entries for the ASGI scope, or others.

    Yields:
        The response.

    Raises:
        TypeError: `app` or `body` is none.
        ValueError: `path`, `capacity` or a header is none.
        TimeoutError: No head came within `timeout` seconds.
        AssertionError: The app returned without a response, or does not return when its client has left.
        Exception: What the app raised: at once if it was before the head, else on reading, or at the
            latest on leaving.
    """
    raw_path, _, query = path.partition("?")
    pairs = list(cast("Mapping[str, str]", headers).items() if isinstance(headers, Mapping) else headers)
    if not callable(app):
        raise TypeError(f"app={short_repr(app)} is not an ASGI app; give what a server is given")
    if not path.startswith("/"):
        raise ValueError(f"path={path!r} is none; give a path that begins with '/', without a scheme and a host")
    if capacity < 1:
        raise ValueError(f"capacity={capacity!r} has no room for anything, not even the head; give 1 or more")
    if json is not ...:
        body = _json_body(json)
        pairs.append(("content-type", "application/json"))
    if not isinstance(body, bytes):
        raise TypeError(f"body={short_repr(body)} is {type(body).__name__}; give bytes, or json=")
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
        "headers": [_header(name, value) for name, value in pairs],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 80),
        **(scope or {}),
    }
    async with opened(OpenStream(app, full_scope, body, capacity, timeout)) as stream:
        yield stream


def assert_event(
    received: ServerSentEvent,
    data: Any = ...,
    *,
    event: str | EllipsisType = ...,
    id: str | int | EllipsisType = ...,  # noqa: A002
) -> None:
    """`received` has to be this event, as of `OpenStream.expect`; it may come from any decoder.

    Raises:
        AssertionError: It is another one.
    """
    differing = _differing(received, data, event, id)
    if differing:
        raise AssertionError(f"expected {_expected(data, event, id)}; {received!r} came: its {differing} differs")


def _header(name: str, value: str) -> tuple[bytes, bytes]:
    try:
        return name.lower().encode("latin-1"), value.encode("latin-1")
    except (AttributeError, UnicodeEncodeError):
        raise ValueError(
            f"headers: {short_repr(name)}: {short_repr(value)} is none; give text, each character of which is a byte. As "
            "UTF-8, which browsers send in Last-Event-ID, it is value.encode().decode('latin-1')"
        ) from None


def _json_body(value: Any) -> bytes:
    return json.dumps(value).encode()


def _expected(data: Any, event: Any, last_id: Any) -> str:
    given = (("data", data), ("event", event), ("id", last_id))
    return ", ".join(f"{name}={short_repr(value)}" for name, value in given if value is not ...) or "an event"


def _differing(received: ServerSentEvent, data: Any, event: Any, last_id: Any) -> str:
    if data is not ... and not _means(received.data or "", data):
        return "data"
    if event is not ... and received.event != event:
        return "type"
    return "id" if last_id is not ... and (received.id or "") != str(last_id) else ""


def _means(text: str, data: Any) -> bool:
    if isinstance(data, str):
        return text == data
    try:
        return bool(json.loads(text) == data)
    except ValueError:
        return False
