"""For Starlette and FastAPI, and in place of sse-starlette: with the import changed, an app of it runs as it is.

What differs from sse-starlette 3.7 is in MIGRATING.md, with the reasons.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeGuard

import anyio

from asgi_sse.errors import InvalidEventError, SendTimeoutError, raise_missing_extra, short_repr
from asgi_sse.protocol import event as core
from asgi_sse.protocol.headers import encode_header
from asgi_sse.runtime.server import Server, server_of
from asgi_sse.stream.draining import DrainingEvent
from asgi_sse.stream.options import StreamOptions
from asgi_sse.stream.receiver import RequestReceiver
from asgi_sse.stream.registry import StreamRegistry, check_registry
from asgi_sse.stream.response import RESPONDER_KEY, registry_of
from asgi_sse.stream.response import EventSourceResponse as PlainResponse
from asgi_sse.stream.source import ThreadedIterator

try:
    from starlette.datastructures import MutableHeaders
    from starlette.endpoints import HTTPEndpoint
    from starlette.responses import Response
except ModuleNotFoundError as exc:
    raise_missing_extra(exc, "starlette", "Starlette", "starlette")

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import EllipsisType

    from starlette.background import BackgroundTask
    from starlette.requests import Request

    from asgi_sse.protocol.asgi import CloseReason, Message, Receive, Scope, Send
    from asgi_sse.stream.stream import Stream

__all__ = [
    "AppStatus",
    "EventSourceEndpoint",
    "EventSourceResponse",
    "JSONServerSentEvent",
    "SendTimeoutError",
    "ServerSentEvent",
    "ensure_bytes",
]

_LINE_END: Final = re.compile(r"\r\n|\r|\n")  # the only ones (WHATWG HTML 9.2.5): str.splitlines() knows others
_DISCONNECT: Final = {"type": "http.disconnect"}


class ServerSentEvent:
    r"""An event as sse-starlette has it: data of any type is sent as ``str(data)``, and the line end is CRLF.

    Args:
        data: Sent as ``str(data)``; ``None``: no data.
        event: The event's type.
        id: What the client sends back as ``Last-Event-ID``.
        retry: The client's reconnection time in milliseconds.
        comment: Text that clients ignore.
        sep: The line end. Default: ``"\r\n"``.
    """

    DEFAULT_SEPARATOR: ClassVar[str] = "\r\n"

    def __init__(
        self,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,  # noqa: A002 (the field's name)
        retry: int | None = None,
        comment: str | None = None,
        sep: str | None = None,
    ) -> None:
        self.data = data
        self.event = event
        self.id = id
        self.retry = retry
        self.comment = comment
        self._sep = self.DEFAULT_SEPARATOR if sep is None else core.check_separator(sep)

    def encode(self) -> bytes:
        """The event as bytes of a stream.

        Raises:
            InvalidEventError: A line end in ``id`` or ``event``, which would inject fields, or a NUL in ``id``.
            TypeError: ``retry`` is not an ``int``.
        """
        sep = self._sep
        text = ""
        if self.comment is not None:
            text = _lines(": ", self.comment, sep)
        if self.id is not None:
            text += f"id: {core.id_text(self.id)}{sep}"
        if self.event is not None:
            text += f"event: {core.one_line(self.event, 'event')}{sep}"
        if self.data is not None:
            text += _lines("data: ", self.data, sep)
        if self.retry is not None:
            if not isinstance(self.retry, int) or isinstance(self.retry, bool):
                raise TypeError("retry argument must be int")
            text += f"retry: {core.milliseconds(self.retry)}{sep}"
        try:
            return (text + sep).encode()
        except UnicodeEncodeError as exc:
            raise InvalidEventError(f"{short_repr(text)} is not UTF-8 ({exc})") from exc

    def __repr__(self) -> str:
        names = ("data", "event", "id", "retry", "comment")
        given = (f"{name}={short_repr(getattr(self, name))}" for name in names if getattr(self, name) is not None)
        return f"{type(self).__name__}({', '.join(given)})"


def _lines(prefix: str, value: object, sep: str) -> str:
    text = str(value)
    if "\n" in text or "\r" in text:
        text = f"{sep}{prefix}".join(_LINE_END.split(text))
    return f"{prefix}{text}{sep}"


class JSONServerSentEvent(ServerSentEvent):
    """An event whose data is JSON; ``None`` is no data.

    Args:
        data: Any JSON value.
        **fields: As in `ServerSentEvent`.

    Raises:
        TypeError: `data` is no JSON value.
        ValueError: `data` holds NaN or an infinity, which are not JSON.
    """

    def __init__(self, data: Any = None, **fields: Any) -> None:
        if data is not None:
            data = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        super().__init__(data, **fields)


def ensure_bytes(data: Any, sep: str) -> bytes:
    """What a source yielded, as bytes of a stream.

    Args:
        data: Bytes, sent as they are; a `ServerSentEvent`, with its own line end; a ``dict`` of its arguments;
            anything else becomes the data of an event, by ``str()``.
        sep: The line end.

    Raises:
        TypeError: A ``dict`` has a key that is no field of an event.
    """
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    if isinstance(data, ServerSentEvent):
        return data.encode()
    if isinstance(data, core.ServerSentEvent):
        return data.encode(sep)
    if isinstance(data, dict):
        return ServerSentEvent(**{**data, "sep": sep}).encode()
    return ServerSentEvent(str(data), sep=sep).encode()


_NO_MORE: Final[dict[str, Any]] = {
    "retry": None, "max_lifetime": ..., "open_timeout": 0.0, "opening_comment": False, "on_error": None
}  # fmt: skip


class EventSourceResponse(Response):
    """sse-starlette's response, on the streams of this library. Starlette and FastAPI take it for their own.

    Args:
        content: Where the events come from: an async iterable, or an iterable, which is run in a thread of
            its own. Each item goes through `ensure_bytes`.
        status_code: The status.
        headers: More headers. ``Connection: keep-alive`` and ``X-Accel-Buffering: no`` stay as they are.
        media_type: The content type. ``None``: ``text/event-stream``.
        background: Run when the stream has ended, unless that was by an error.
        ping: Seconds after which an idle stream gets a comment; ``0``: never. Default: 15, or the app's default.
        sep: The line end. Default: CRLF.
        ping_message_factory: Makes that comment.
        data_sender_callable: Run beside the stream; it is cancelled when that ends. What it raises fails the stream.
        send_timeout: Seconds that the client may take for one message before it is dropped; ``0``: any time.
            Default: 30, or the app's default.
        client_close_handler_callable: Awaited with ``{"type": "http.disconnect"}`` when the client leaves.
        shutdown_event: Set when the server is about to stop.
        shutdown_grace_period: Seconds that the source then has to end by itself.
        cleanup_timeout: Seconds that the source has for its clean-up; ``None``: any time.
        retry: As in `asgi_sse.EventSourceResponse`, and so all that follow; sse-starlette does not have them.
        max_lifetime: See there.
        open_timeout: See there.
        opening_comment: See there.
        on_error: See there.
        on_close: See there.
        registry: See there.

    Raises:
        TypeError: An argument is of a wrong kind. What is wrong with `content` is raised when it is called.
        ValueError: An argument is out of range.
    """

    DEFAULT_PING_INTERVAL: ClassVar[float] = 15
    DEFAULT_SEPARATOR: ClassVar[str] = "\r\n"
    DEFAULT_CLEANUP_TIMEOUT: ClassVar[float] = 30.0

    media_type = "text/event-stream"
    body_iterator: Any

    def __init__(  # noqa: PLR0917 (their order is sse-starlette's)
        self,
        content: AsyncIterable[Any] | Iterable[Any],
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = "text/event-stream",
        background: BackgroundTask | None = None,
        ping: float | None = None,
        sep: str | None = None,
        ping_message_factory: Callable[[], Any] | None = None,
        data_sender_callable: Callable[[], Awaitable[None]] | None = None,
        send_timeout: float | None = None,
        client_close_handler_callable: Callable[[Message], Awaitable[None]] | None = None,
        shutdown_event: anyio.Event | None = None,
        shutdown_grace_period: float = 0,
        cleanup_timeout: float | None = DEFAULT_CLEANUP_TIMEOUT,
        *,
        retry: int | None = None,
        max_lifetime: float | None | EllipsisType = ...,
        open_timeout: float = 0.0,
        opening_comment: bool = False,
        on_error: Callable[[Exception], Any] | None = None,
        on_close: Callable[[CloseReason], Any] | None = None,
        registry: StreamRegistry | None = None,
    ) -> None:
        if sep not in (None, *core.SEPARATORS):
            raise ValueError(f"sep must be one of: \\r\\n, \\r, \\n, got: {sep}")
        if not shutdown_grace_period >= 0:
            raise ValueError("shutdown_grace_period must be >= 0")
        if cleanup_timeout is not None and not cleanup_timeout >= 0:
            raise ValueError("cleanup_timeout must be >= 0")
        self.sep = sep or self.DEFAULT_SEPARATOR
        self._ping_interval: float | None = None
        if ping is not None:
            self.ping_interval = ping
        # Asynchronous for who wraps it, as in sse-starlette. What is no source at all is refused when it is sent.
        self._thread = ThreadedIterator(content, ahead=False) if _is_sync_series(content) else None
        self.body_iterator = self._thread or _without_fastapi(content)
        self.status_code = status_code
        self.media_type = media_type or type(self).media_type
        self.background = background
        self.ping_message_factory = ping_message_factory
        self.data_sender_callable = data_sender_callable
        self.send_timeout = send_timeout
        self.client_close_handler_callable = client_close_handler_callable
        self._shutdown_event = shutdown_event
        self._shutdown_grace_period = shutdown_grace_period
        self._cleanup_timeout = cleanup_timeout
        self._more: dict[str, Any] = {
            "retry": retry,
            "max_lifetime": max_lifetime,
            "open_timeout": open_timeout,
            "opening_comment": opening_comment,
            "on_error": on_error,
        }
        self._on_close = on_close
        if registry is not None:
            check_registry(registry)
        self._registry = registry
        self._told = False
        self._stream: Stream | None = None
        self.active = True
        # Checked now, not when it is sent.
        if send_timeout is not None or on_close is not None or self._more != _NO_MORE:
            more = {name: value for name, value in self._more.items() if value is not ...}
            StreamOptions(send_timeout=send_timeout, on_close=on_close, **more)
        merged = MutableHeaders()
        for name, value in (headers or {}).items():
            encode_header(name, value)
            merged[name] = value
        merged.setdefault("cache-control", "no-store")
        merged["connection"] = "keep-alive"
        merged["x-accel-buffering"] = "no"
        self.init_headers(merged)

    @property
    def ping_interval(self) -> float:
        """Seconds after which an idle stream gets a comment; ``0``: never.

        Raises:
            TypeError: Set to what is no number.
            ValueError: Set to a negative number.
        """
        return self.DEFAULT_PING_INTERVAL if self._ping_interval is None else self._ping_interval

    @ping_interval.setter
    def ping_interval(self, value: float) -> None:
        if not isinstance(value, int | float):
            raise TypeError("ping interval must be int or float")
        if not value >= 0:
            raise ValueError("ping interval must be >= 0 (0 disables ping)")
        self._ping_interval = value

    def enable_compression(self, force: bool = False) -> None:  # noqa: FBT001, FBT002 (as it is called)
        """Not supported, as compressors hold events back.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("Compression is not supported for SSE streams.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, and return when the stream is over, its source cleaned up and the background run."""
        if scope["type"] == "websocket":
            scope, receive, send = _denial(scope, receive, send)
        try:
            await self._answer(scope, receive, send)
        finally:
            self.active = False
        if self.background is not None:
            await self.background()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("path", "")  # ASGI requires it; tests that were written for sse-starlette leave it out
        responder = scope.get(RESPONDER_KEY)
        server = server_of(send) if responder is None else responder.server
        registry = self._registry
        if registry is None:
            registry = registry_of(scope) if AppStatus.enable_automatic_graceful_drain else _by_hand
        response = self._make(registry)
        response.raw_headers = _headers_for(scope, self.raw_headers)
        draining = _Draining(self._shutdown_event, self._shutdown_grace_period)
        running = response.serve(scope, RequestReceiver(self._telling(receive)), send, server, draining)
        stream = response.stream
        if stream is None:  # HEAD, or the server is stopping already
            await running
            return
        self._stream = stream
        _running[self] = registry, stream
        try:
            if AppStatus.ends_all:
                stream.loop.call_soon(partial(registry.end, (stream,)))
            await running
        finally:
            del _running[self]
            self._stream = None
            if self._thread is not None and self.body_iterator is not self._thread:
                with anyio.CancelScope(shield=True):
                    await self._thread.aclose()  # who wraps an iterator rarely closes it

    def _make(self, registry: StreamRegistry) -> PlainResponse:
        given = (
            self._ping_interval is not None or self.DEFAULT_PING_INTERVAL != EventSourceResponse.DEFAULT_PING_INTERVAL
        )
        timeout = self._cleanup_timeout
        response = PlainResponse(
            self.body_iterator,
            ping=self.ping_interval if given else ...,
            ping_message_factory=self.ping_message_factory or self._make_ping,
            sep=self.sep,
            send_timeout=... if self.send_timeout is None else self.send_timeout,
            cleanup_timeout=float("inf") if timeout is None else timeout,
            on_close=self._closed,
            registry=registry,
            **self._more,
        )
        response.status_code = self.status_code
        response.encoder = _encode
        response.unbuffered = True
        response.feeder = self.data_sender_callable
        return response

    def _make_ping(self) -> ServerSentEvent:
        return ServerSentEvent(comment=f"ping - {datetime.now(UTC)}", sep=self.sep)

    def _telling(self, receive: Receive) -> Receive:
        if self.client_close_handler_callable is None:
            return receive

        async def receive_and_tell() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and self._stream is not None and self._stream.reason is None:
                await self._tell(message)  # before the source ends, which may wait for what the handler does
            return message

        return receive_and_tell

    async def _tell(self, message: Message) -> None:
        handler = self.client_close_handler_callable
        if handler is not None and not self._told:
            self._told = True
            await handler(message)

    async def _closed(self, reason: CloseReason) -> None:
        if reason == "disconnected":  # as a send found, or by the server's cancellation
            await self._tell(dict(_DISCONNECT))
        if self._on_close is not None:
            result = self._on_close(reason)
            if hasattr(result, "__await__"):
                await result


def _encode(item: Any, sep: str, json_dumps: core.JSONDumps | None) -> bytes:  # noqa: ARG001 (not of sse-starlette)
    return ensure_bytes(item, sep)


def _is_sync_series(content: object) -> TypeGuard[Iterable[Any]]:
    return isinstance(content, Iterable) and not isinstance(
        content, AsyncIterable | str | bytes | bytearray | memoryview | Mapping
    )


def _without_fastapi(content: Any) -> Any:
    """A path operation's own generator: FastAPI puts one around it that does not close it."""
    code = getattr(content, "ag_code", None)
    if code is not None and code.co_name == "_async_stream_raw" and content.ag_frame is not None:
        return content.ag_frame.f_locals.get("async_gen", content)
    return content


def _headers_for(scope: Scope, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    if str(scope.get("http_version", "1.1")) < "2":
        return headers
    return [pair for pair in headers if pair[0] != b"connection"]  # which HTTP/2 forbids (RFC 9113, 8.2.2)


def _denial(scope: Scope, receive: Receive, send: Send) -> tuple[Scope, Receive, Send]:
    """A refused websocket as the HTTP request that it was (ASGI, "Websocket Denial Response")."""

    async def receive_http() -> Message:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return dict(_DISCONNECT)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send_denial(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    return {**scope, "type": "http", "method": "GET"}, receive_http, send_denial


class EventSourceEndpoint(HTTPEndpoint):
    """An endpoint class: override `events`, and give the class to a ``Route``.

    It answers GET and HEAD; for others too, say ``post = EventSourceEndpoint.get``.

    Attributes:
        options: More arguments of the `EventSourceResponse`.
    """

    options: ClassVar[Mapping[str, Any]] = {}

    def events(self, request: Request) -> AsyncIterable[Any] | Iterable[Any]:
        """The events for a request: best as an async generator."""
        raise NotImplementedError(
            f"{type(self).__name__}.events(self, {short_repr(request)}) is missing: yield the events"
        )

    async def get(self, request: Request) -> EventSourceResponse:
        """Answer the request."""
        return EventSourceResponse(self.events(request), **self.options)


# How the server's end is told, and made, by hand

_running: Final[dict[EventSourceResponse, tuple[StreamRegistry, Stream]]] = {}
"""The responses that are being sent."""


class _Draining(DrainingEvent):
    """Sets the user's event too."""

    __slots__ = ("_also",)

    def __init__(self, also: anyio.Event | None, grace: float) -> None:
        super().__init__(grace=grace)
        self._also = also

    def set(self) -> None:
        super().set()
        if self._also is not None:
            self._also.set()


class _ByHand(StreamRegistry):
    """Its streams end by `AppStatus.should_exit` alone."""

    def watch(self, server: Server) -> None:
        pass


_by_hand: Final = _ByHand()


class _Status(type):
    ends_all = False  # by hand

    @property
    def should_exit(cls) -> bool:
        return cls.ends_all or any(registry.draining for registry, _ in list(_running.values()))

    @should_exit.setter
    def should_exit(cls, value: bool) -> None:
        cls.ends_all = bool(value)
        if value:
            for registry, stream in list(_running.values()):
                registry.end((stream,))


class AppStatus(metaclass=_Status):
    """Whether the server is stopping, for all streams of this room in the process.

    Attributes:
        should_exit: True while a server stops under running streams. Set to True, from any thread, it ends all of
            them, and new ones at once, until it is set to False again.
        enable_automatic_graceful_drain: Whether a stream that begins will end when its server stops.
        original_handler: Called by `handle_exit`.
    """

    enable_automatic_graceful_drain: ClassVar[bool] = True
    original_handler: ClassVar[Callable[..., Any] | None] = None

    @staticmethod
    def disable_automatic_graceful_drain() -> None:
        """Streams that begin from now on end by ``AppStatus.should_exit = True`` alone."""
        AppStatus.enable_automatic_graceful_drain = False

    @staticmethod
    def enable_automatic_graceful_drain_mode() -> None:
        """Streams that begin from now on end when their server stops."""
        AppStatus.enable_automatic_graceful_drain = True

    @staticmethod
    def handle_exit(*args: Any, **kwargs: Any) -> None:
        """What a handler of a signal may call to end the streams."""
        if AppStatus.enable_automatic_graceful_drain:
            AppStatus.should_exit = True
        if AppStatus.original_handler is not None:
            AppStatus.original_handler(*args, **kwargs)
