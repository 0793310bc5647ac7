"""Drives an ASGI app in-process on a stream that may never end.

httpx's ``ASGITransport`` and Starlette's ``TestClient`` run an app to its end before they give its
response, and so hang on an endless stream; here the app runs beside the test.
"""

from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast
from urllib.parse import unquote

import anyio

from ._types import ASGIApp, Message, Scope
from .decoder import EventDecoder
from .errors import StreamClosedError
from .event import ServerSentEvent


class OpenStream:
    """A response under way, as a client sees it. Made by `open_stream`.

    Attributes:
        status: The response's status.
        headers: Its headers, names in lower case; the last value of a name that comes twice.
        complete: Whether the body has ended properly. A server would cut the connection of one that
            has not.
        retry: The reconnection time in milliseconds that the stream asked for last.
        last_event_id: What a client would send as ``Last-Event-ID``.
    """

    def __init__(self, app: ASGIApp, scope: Scope, body: bytes, capacity: int) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = False
        self._app = app
        self._scope = scope
        self._body: bytes | None = body
        self._capacity = capacity
        self._messages: deque[Message] = deque()
        self._changed = anyio.Event()
        self._disconnected = False
        self._returned = False
        self._error: BaseException | None = None
        self._decoder = EventDecoder()
        self._events: deque[ServerSentEvent] = deque()

    @property
    def retry(self) -> int | None:
        """See the class."""
        return self._decoder.retry

    @property
    def last_event_id(self) -> str:
        """See the class."""
        return self._decoder.last_event_id

    async def read(self, timeout: float = 1.0) -> bytes:
        """The next piece of the body as the app sent it; ``b""`` at its end.

        Raises:
            TimeoutError: None came within `timeout` seconds.
            Exception: What the app raised.
        """
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
        self._raise_error()
        return b""

    async def receive(self, timeout: float = 1.0) -> ServerSentEvent:
        """The next event.

        Raises:
            TimeoutError: None came within `timeout` seconds.
            StreamClosedError: The stream has ended.
            Exception: What the app raised.
        """
        with anyio.fail_after(timeout):
            while not self._events:
                chunk = await self.read(timeout)
                if not chunk:
                    raise StreamClosedError(
                        f"the body has ended{'' if self.complete else ', cut'}; there is no event more"
                    )
                self._events.extend(self._decoder.feed(chunk))
            return self._events.popleft()

    def __aiter__(self) -> AsyncIterator[ServerSentEvent]:
        return self

    async def __anext__(self) -> ServerSentEvent:
        try:
            return await self.receive(timeout=float("inf"))
        except StreamClosedError:
            raise StopAsyncIteration from None

    async def disconnect(self) -> None:
        """Leave, as a client that closes its connection, and wait until the app has returned.

        Raises:
            Exception: What the app raised.
        """
        self._disconnected = True
        self._notify()
        await self._wait_returned()
        self._raise_error()

    async def _wait_returned(self) -> None:
        while not self._returned:
            await self._changed.wait()

    async def run(self) -> None:
        """Run the app."""
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception as exc:
            self._error = exc
        finally:
            self._returned = True
            self._notify()

    async def _wait_for_head(self) -> None:
        while not (self.status or self._returned):
            await self._changed.wait()
        if not self.status:
            self._raise_error()
            raise AssertionError("the app returned without a response")

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        while not self._disconnected:
            await self._changed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        # Like every server: without waiting while there is room, and to nobody without complaint.
        while len(self._messages) >= self._capacity and not self._disconnected:
            await self._changed.wait()
        if self._disconnected:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {
                name.decode("latin-1"): value.decode("latin-1") for name, value in message.get("headers", ())
            }
        elif message["type"] == "http.response.body":
            self._messages.append(message)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


@asynccontextmanager
async def open_stream(
    app: ASGIApp,
    path: str = "/",
    *,
    method: str = "GET",
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    capacity: int = 16,
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
        capacity: Body messages that fit between app and client: when they are unread, the app's
            ``send`` waits, as it does for a slow client.
        scope: More entries for the ASGI scope, or others.

    Yields:
        The response.

    Raises:
        Exception: What the app raised: at once if it was before the head, else on reading, or at the
            latest on leaving.
    """
    raw_path, _, query = path.partition("?")
    pairs = cast("Mapping[str, str]", headers).items() if isinstance(headers, Mapping) else headers
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
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 80),
        **(scope or {}),
    }
    stream = OpenStream(app, full_scope, body, capacity)
    error: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.run)
        try:
            await stream._wait_for_head()  # noqa: SLF001
            yield stream
        except Exception as exc:  # carried out of the task group, which would wrap it in a group
            error = exc
        finally:
            with anyio.CancelScope(shield=True):
                stream._disconnected = True  # noqa: SLF001
                stream._notify()  # noqa: SLF001
                await stream._wait_returned()  # noqa: SLF001
    if error is not None:
        raise error
    stream._raise_error()  # noqa: SLF001
