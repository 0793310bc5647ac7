"""`AppRequest`: one request to an app in-process, and its response in the messages that the app sends."""

import weakref
from collections import deque
from typing import Final

import anyio
import anyio.lowlevel

from asgi_sse.protocol.asgi import ASGIApp, Message, Scope

from .app_task import DEFAULT_TIMEOUT_S, AppTask
from .clock import real_deadline

open_requests: Final["weakref.WeakSet[AppRequest]"] = weakref.WeakSet()
"""The requests whose app has not returned. The pytest plugin names them when a test hangs or leaks."""


class AppRequest:
    """Runs one request against an app and collects the messages of its response.

    It plays the server: it checks the order of the messages, and the app's ``send`` waits while `capacity` messages are
    unread.

    Args:
        app: The app.
        scope: The scope of the request. The app gets a copy.
        body: The body of the request.
        capacity: The number of unread body messages at which the app's ``send`` waits.
        timeout: Seconds of real time for the response start, and for the app's return after the disconnect.
    """

    def __init__(
        self, app: ASGIApp, scope: Scope, body: bytes, capacity: int, timeout: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self.status: int = 0
        self.headers: dict[str, str] = {}
        self.raw_headers: list[tuple[bytes, bytes]] = []
        self.complete: bool = False
        self._app = app
        self._scope = scope
        self._request_body = body
        self._capacity = capacity
        self._timeout = timeout
        self._task = AppTask()
        self._messages: deque[Message] = deque()
        self._body: bytes | None = body  # until the app has received it
        self._answered = False  # the app has sent the last message, which the test may not have read yet
        self._disconnected = False
        self._send_failed = False  # a send was cancelled while it waited for the test to read

    def __repr__(self) -> str:
        state = "ended" if self.complete else "returned" if self._task.returned else "open"
        if self._send_failed:
            state += f", dropped while it had as many unread messages as capacity={self._capacity} allows"
        start = self.status or "no response yet"
        return f"<{type(self).__name__} {self._scope['method']} {self._scope['path']} {start} {state}>"

    def start(self) -> None:
        """Start the app in a task of its own."""
        self._task.start(self._call_app, f"asgi_sse.testing {self._scope['path']}")

    async def wait_for_start(self) -> None:
        """Wait until the app has sent the response start.

        Raises:
            AssertionError: The app returned without sending it.
            Exception: What the app raised.
        """
        await self._task.wait_until(self._started_or_returned)
        if not self.status:
            self._task.raise_error()
            raise AssertionError("the app must send a response, but it returned without one")

    async def wait_for_start_in_time(self) -> None:
        """Wait until the app has sent the response start, up to the timeout.

        Raises:
            TimeoutError: The app did not send it in time.
            AssertionError: The app returned without sending it.
            Exception: What the app raised.
        """
        with real_deadline(self._timeout) as deadline:
            await self.wait_for_start()
        if deadline.cancelled_caught:  # the process may have been suspended before the app took its first step
            await anyio.lowlevel.checkpoint()
        if deadline.cancelled_caught and not self._started_or_returned():
            raise TimeoutError(
                f"the app must send its response start within {self._timeout:g} s, got {self!r}; give open_stream() a "
                "longer timeout if the app needs it"
            )
        await self.wait_for_start()  # the response start may have come in the turn of the deadline

    def _started_or_returned(self) -> bool:
        return self.status > 0 or self._task.returned

    async def read(self, timeout: float = 1.0) -> bytes:
        """Return the next chunk of the body as the app sent it, or ``b""`` at the end.

        `receive` does not see the events in it. Only this method shows comments, and so keep-alives.

        Args:
            timeout: Seconds to wait for it.

        Raises:
            TimeoutError: No chunk came in time.
            Exception: What the app raised.
        """
        chunk = await self.try_read(timeout)
        if isinstance(chunk, TimeoutError):
            raise chunk
        return chunk

    async def try_read(self, timeout: float) -> bytes | TimeoutError:
        """Return what `read` returns, or the timeout error that it raises. So only the app's own errors are raised."""
        with anyio.move_on_after(timeout) as deadline:
            while not self.complete:
                if not self._messages:
                    if self._task.returned:
                        break
                    await self._task.wait_for_change()
                    continue
                message = self._messages.popleft()
                self._task.notify()
                self.complete = not message.get("more_body", False)
                if message.get("body"):
                    return bytes(message["body"])
        if deadline.cancelled_caught:
            return TimeoutError(f"nothing came within {timeout:g} s{self.describe_progress()}")
        self._task.raise_error()
        return b""

    def describe_progress(self) -> str:
        """Return what a failure says about the response so far."""
        text = f". {self!r}"
        content_type = self.headers.get("content-type", "")
        if self.status != 200 or not content_type.startswith("text/event-stream"):
            text += f", which is not an event stream: its content-type is {content_type or 'missing'}"
        return text

    def is_app_error(self, exc: BaseException) -> bool:
        """Return whether the app raised `exc`."""
        return self._task.is_app_error(exc)

    async def disconnect(self) -> None:
        """Disconnect like a client that closes its connection, and wait until the app has returned.

        Raises:
            AssertionError: The app did not return within the ``timeout`` of `open_stream`, and was cancelled.
            Exception: What the app raised.
        """
        self._disconnected = True
        self._task.notify()
        if not await self._task.wait_returned(self._timeout):
            state = repr(self)  # before the cancellation, after which the app has returned
            if not await self._task.cancel():
                self._task.force_cancel()
            raise AssertionError(
                f"the app has not returned {self._timeout:g} s after its client has left: {state}. It must end when "
                "receive() returns http.disconnect, as an EventSourceResponse does"
            )
        self._task.raise_error()

    async def _call_app(self) -> None:
        open_requests.add(self)
        try:
            await self._app(dict(self._scope, headers=list(self._scope["headers"])), self._receive, self._send)
        finally:
            open_requests.discard(self)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._task.wait_until(lambda: self._disconnected or self._answered)
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        # Like every server: return at once while there is room, and silently after the client has left.
        while len(self._messages) >= self._capacity and not self._disconnected:
            try:
                await self._task.wait_for_change()
            except BaseException:
                self._send_failed = not self._disconnected
                raise
        self._send_failed = False  # after a failed send, the app has tried again and found room
        if self._disconnected:
            return
        self._check_order(message["type"])
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.raw_headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.raw_headers}
        elif message["type"] == "http.response.body":
            self._messages.append(message)
            self._answered = not message.get("more_body", False)
        self._task.notify()

    def _check_order(self, kind: str) -> None:
        """Raise for a message that a server would refuse: it would raise as well, and cut the connection.

        Raises:
            RuntimeError: The response start is repeated, or a body message comes before it or after the last one.
        """
        started = self.status > 0
        if kind in ("http.response.start", "http.response.body") and started != (kind == "http.response.body"):
            raise RuntimeError(f"the app sent {kind} {'twice' if started else 'before http.response.start'}: {self!r}")
        if kind == "http.response.body" and self._answered:
            raise RuntimeError(f"the app sent {kind} after the last one, which had no more_body: {self!r}")
