"""The adapter for Starlette and FastAPI, and a drop-in for sse-starlette: an app runs on it once its import is changed.

MIGRATING.md lists every difference from sse-starlette 3.7, with its reason.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypedDict, TypeGuard, Unpack

import anyio

from asgi_sse.errors import SendTimeoutError, raise_missing_extra, short_repr
from asgi_sse.protocol.event import SEPARATORS
from asgi_sse.protocol.headers import encode_header
from asgi_sse.runtime.server import server_of
from asgi_sse.stream.draining import DrainingEvent
from asgi_sse.stream.options import StreamOptions
from asgi_sse.stream.receiver import RequestReceiver
from asgi_sse.stream.registry import StreamRegistry, check_registry
from asgi_sse.stream.response import RESPONDER_KEY, registry_of
from asgi_sse.stream.response import EventSourceResponse as PlainResponse
from asgi_sse.stream.source import ThreadedIterator

from .sse_starlette_event import JSONServerSentEvent, ServerSentEvent, ensure_bytes
from .sse_starlette_status import AppStatus, manual_registry, running_streams

try:
    from starlette.datastructures import MutableHeaders
    from starlette.endpoints import HTTPEndpoint
    from starlette.responses import Response
except ModuleNotFoundError as _error:
    raise_missing_extra(_error, "starlette", "Starlette", "starlette")

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import EllipsisType

    from starlette.background import BackgroundTask
    from starlette.requests import Request

    from asgi_sse.protocol.asgi import CloseReason, Message, Receive, Scope, Send
    from asgi_sse.protocol.event import JSONDumps
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

_DISCONNECT: Final = {"type": "http.disconnect"}

# sse-starlette sends neither a reconnection time nor an opening comment.
_DEFAULTS: Final[dict[str, Any]] = {"retry": None, "opening_comment": False}


class AddedArguments(TypedDict, total=False):
    """The arguments of `EventSourceResponse` that sse-starlette does not have."""

    retry: int | None
    max_lifetime: float | None | EllipsisType
    open_timeout: float
    opening_comment: bool
    on_error: Callable[[Exception], Any] | None
    on_close: Callable[[CloseReason], Any] | None
    registry: StreamRegistry | None


class EventSourceResponse(Response):
    """A response with sse-starlette's arguments and bytes, on the streams of this library.

    Starlette and FastAPI accept it as one of their own responses.

    Args:
        content: The source of the events: an async iterable, or an iterable, which runs in a thread of its own. Each
            event is encoded by `ensure_bytes`.
        status_code: The status. Default: 200.
        headers: More response headers. ``Connection: keep-alive`` and ``X-Accel-Buffering: no`` cannot be replaced.
        media_type: The content type. ``None`` means ``text/event-stream``.
        background: A task to run when the stream has ended, unless it ended by an error.
        ping: Seconds of silence after which the client is sent a keep-alive; 0 turns keep-alives off. Default: 15, or
            the default of the `SSEMiddleware` around the app.
        sep: The line end. Default: CRLF.
        ping_message_factory: A function that makes the keep-alive. Default: a comment with the time.
        data_sender_callable: A coroutine function to run beside the stream. It is cancelled when the stream ends. An
            exception from it fails the stream.
        send_timeout: Seconds that the client may take for one message before it is dropped; 0 means no limit.
            Default: 30, or the default of the `SSEMiddleware` around the app.
        client_close_handler_callable: A coroutine function, called with ``{"type": "http.disconnect"}`` when the
            client disconnects.
        shutdown_event: An event that is set when the server is about to stop.
        shutdown_grace_period: Seconds that the source then has to end by itself. Default: 0.
        cleanup_timeout: Seconds that the source has for its clean-up; ``None`` means no limit. Default: 30.
        **options: The arguments `retry`, `max_lifetime`, `open_timeout`, `opening_comment`, `on_error`, `on_close` and
            `registry` of `asgi_sse.EventSourceResponse`. The stream opens without a reconnection time and without a
            comment unless you pass `retry` or `opening_comment`.

    Attributes:
        active: True until the response is over.
        body_iterator: The source as an async iterator. You may wrap it before the response is sent.
        DEFAULT_PING_INTERVAL: The seconds that count without `ping`. A subclass may set others.
        DEFAULT_SEPARATOR: The line end that counts without `sep`.
        DEFAULT_CLEANUP_TIMEOUT: The default of `cleanup_timeout` in seconds.

    Raises:
        TypeError: An argument has a wrong type. An invalid `content` raises when the response is sent, as in
            sse-starlette.
        ValueError: An argument is out of range.
    """

    DEFAULT_PING_INTERVAL: ClassVar[float] = 15
    DEFAULT_SEPARATOR: ClassVar[str] = "\r\n"
    DEFAULT_CLEANUP_TIMEOUT: ClassVar[float] = 30.0

    media_type: str | None = "text/event-stream"
    body_iterator: Any

    def __init__(  # noqa: PLR0917 (sse-starlette's order of positional arguments)
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
        **options: Unpack[AddedArguments],
    ) -> None:
        _check_arguments(sep, shutdown_grace_period, cleanup_timeout)
        self.sep: str = sep or self.DEFAULT_SEPARATOR
        self._ping_interval: float | None = None
        if ping is not None:
            self.ping_interval = ping
        # An async iterator even for a synchronous source, as in sse-starlette, for code that wraps `body_iterator`.
        self._thread = ThreadedIterator(content, ahead=False) if _is_sync_source(content) else None
        self.body_iterator = self._thread or _unwrap_fastapi(content)
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
        if options or send_timeout is not None:
            _check_options(send_timeout, options)
        self._registry = options.pop("registry", None)
        self._on_close = options.pop("on_close", None)
        self._options = options
        self._close_handler_called = False
        self._stream: Stream | None = None
        self.active: bool = True
        self.init_headers(_merge_headers(headers))

    @property
    def ping_interval(self) -> float:
        """Seconds of silence after which the client is sent a keep-alive; 0 turns keep-alives off.

        Raises:
            TypeError: The new value is not a number.
            ValueError: The new value is negative.
        """
        return self.DEFAULT_PING_INTERVAL if self._ping_interval is None else self._ping_interval

    @ping_interval.setter
    def ping_interval(self, value: float) -> None:
        # The starts of these texts are sse-starlette's own, which its users match.
        if not isinstance(value, int | float):
            raise TypeError(f"ping interval must be int or float, got {short_repr(value)}; give seconds")
        if not value >= 0:
            raise ValueError(f"ping interval must be >= 0, got {value!r}; pass 0 to turn keep-alives off")
        self._ping_interval = value

    def enable_compression(self, force: bool = False) -> None:  # noqa: FBT001, FBT002 (sse-starlette's signature)
        """Raise an error, because a compressor would hold events back.

        Args:
            force: Ignored, as in sse-starlette.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("Compression is not supported for SSE streams.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request. Return when the stream has ended, its source has cleaned up and `background` has run."""
        if scope["type"] == "websocket":
            scope, receive, send = _denial_response(scope, receive, send)
        try:
            await self._answer(scope, receive, send)
        finally:
            self.active = False
        if self.background is not None:
            await self.background()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("path", "")  # ASGI requires a path, but tests written for sse-starlette leave it out
        responder = scope.get(RESPONDER_KEY)
        server = server_of(send) if responder is None else responder.server
        registry = self._registry
        if registry is None:
            registry = registry_of(scope) if AppStatus.enable_automatic_graceful_drain else manual_registry
        response = self._make_response(registry)
        response.raw_headers = _headers_for(scope, self.raw_headers)
        draining = _ForwardingDrainingEvent(self._shutdown_event, self._shutdown_grace_period)
        receiver = RequestReceiver(self._with_close_handler(receive))
        running = response.serve(scope, receiver, send, server, draining)
        stream = response.stream
        if stream is None:  # a HEAD request, or the server is already stopping
            await running
            return
        self._stream = stream
        running_streams[stream] = registry
        try:
            if AppStatus.exits_by_hand:
                stream.loop.call_soon(partial(registry.end, (stream,)))
            await running
        finally:
            del running_streams[stream]
            self._stream = None
            if self._thread is not None and self.body_iterator is not self._thread:
                with anyio.CancelScope(shield=True):
                    await self._thread.aclose()  # a wrapper around an iterator rarely closes it

    def _make_response(self, registry: StreamRegistry) -> PlainResponse:
        own_interval = (
            self._ping_interval is not None or self.DEFAULT_PING_INTERVAL != EventSourceResponse.DEFAULT_PING_INTERVAL
        )
        timeout = self._cleanup_timeout
        more: dict[str, Any] = {**_DEFAULTS, **self._options}
        response = PlainResponse(
            self.body_iterator,
            ping=self.ping_interval if own_interval else ...,
            ping_message_factory=self.ping_message_factory or self._make_ping,
            sep=self.sep,
            send_timeout=... if self.send_timeout is None else self.send_timeout,
            cleanup_timeout=float("inf") if timeout is None else timeout,
            on_close=self._closed,
            registry=registry,
            **more,
        )
        response.status_code = self.status_code
        response.encoder = _encode
        response.unbuffered = True
        response.feeder = self.data_sender_callable
        return response

    def _make_ping(self) -> ServerSentEvent:
        return ServerSentEvent(comment=f"ping - {datetime.now(UTC)}", sep=self.sep)

    def _with_close_handler(self, receive: Receive) -> Receive:
        if self.client_close_handler_callable is None:
            return receive

        async def receive_and_call_handler() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and self._stream is not None and self._stream.reason is None:
                # Before the source is ended, because its clean-up may wait for what the handler does.
                await self._call_close_handler(message)
            return message

        return receive_and_call_handler

    async def _call_close_handler(self, message: Message) -> None:
        handler = self.client_close_handler_callable
        if handler is not None and not self._close_handler_called:
            self._close_handler_called = True
            await handler(message)

    async def _closed(self, reason: CloseReason) -> None:
        if reason == "disconnected":  # found by a send, or by the server's cancellation
            await self._call_close_handler(dict(_DISCONNECT))
        if self._on_close is not None:
            result = self._on_close(reason)
            if hasattr(result, "__await__"):
                await result


class _ForwardingDrainingEvent(DrainingEvent):
    """A draining event that also sets the user's ``shutdown_event``."""

    __slots__ = ("_shutdown_event",)

    def __init__(self, shutdown_event: anyio.Event | None, grace: float) -> None:
        super().__init__(grace=grace)
        self._shutdown_event = shutdown_event

    def set(self) -> None:
        super().set()
        if self._shutdown_event is not None:
            self._shutdown_event.set()


def _check_arguments(sep: str | None, shutdown_grace_period: float, cleanup_timeout: float | None) -> None:
    # The starts of these texts are sse-starlette's own, which its users match.
    if sep not in (None, *SEPARATORS):
        raise ValueError(f"sep must be one of: \\r\\n, \\r, \\n, got: {sep}")
    if not shutdown_grace_period >= 0:
        raise ValueError(f"shutdown_grace_period must be >= 0, got {shutdown_grace_period!r}; give seconds")
    if cleanup_timeout is not None and not cleanup_timeout >= 0:
        raise ValueError(f"cleanup_timeout must be >= 0, got {cleanup_timeout!r}; give seconds, or None for no limit")


def _check_options(send_timeout: float | None, options: AddedArguments) -> None:
    """Raise if an option is invalid, now and not when a client waits."""
    unknown = [name for name in options if name not in AddedArguments.__annotations__]
    if unknown:
        raise TypeError(f"EventSourceResponse() got an unexpected keyword argument {unknown[0]!r}")
    checked = {name: value for name, value in options.items() if name != "registry" and value is not ...}
    StreamOptions(send_timeout=send_timeout, **checked)  # type: ignore[arg-type]  # the TypedDict has the types
    if (registry := options.get("registry")) is not None:
        check_registry(registry)


def _merge_headers(headers: Mapping[str, str] | None) -> MutableHeaders:
    merged = MutableHeaders()
    for name, value in (headers or {}).items():
        encode_header(name, value)
        merged[name] = value
    merged.setdefault("cache-control", "no-store")
    merged["connection"] = "keep-alive"
    merged["x-accel-buffering"] = "no"
    return merged


def _encode(item: Any, sep: str, json_dumps: JSONDumps | None) -> bytes:  # noqa: ARG001 (sse-starlette has none)
    return ensure_bytes(item, sep)


def _is_sync_source(content: object) -> TypeGuard[Iterable[Any]]:
    return isinstance(content, Iterable) and not isinstance(
        content, AsyncIterable | str | bytes | bytearray | memoryview | Mapping
    )


def _unwrap_fastapi(content: Any) -> Any:
    """Return the generator of a FastAPI path operation without FastAPI's own generator, which does not close it."""
    code = getattr(content, "ag_code", None)
    if code is not None and code.co_name == "_async_stream_raw" and content.ag_frame is not None:
        return content.ag_frame.f_locals.get("async_gen", content)
    return content


def _headers_for(scope: Scope, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    if str(scope.get("http_version", "1.1")) < "2":
        return headers
    return [pair for pair in headers if pair[0] != b"connection"]  # HTTP/2 forbids it (RFC 9113, 8.2.2)


def _denial_response(scope: Scope, receive: Receive, send: Send) -> tuple[Scope, Receive, Send]:
    """Return a websocket request as the HTTP request that it began as (ASGI, "Websocket Denial Response")."""

    async def receive_http() -> Message:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return dict(_DISCONNECT)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send_denial(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    return {**scope, "type": "http", "method": "GET"}, receive_http, send_denial


class EventSourceEndpoint(HTTPEndpoint):
    """An endpoint class for Starlette: override `events` and pass the class to a ``Route``.

    It answers GET and HEAD. To answer POST as well, add ``post = EventSourceEndpoint.get``.

    Attributes:
        options: More arguments of the `EventSourceResponse`. Default: none.
    """

    options: ClassVar[Mapping[str, Any]] = {}

    def events(self, request: Request) -> AsyncIterable[Any] | Iterable[Any]:
        """Return the source of the events for a request. An async generator method is best.

        Args:
            request: Starlette's request.

        Raises:
            NotImplementedError: The subclass does not override this method.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define events(self, request); make it an async generator of the events"
        )

    async def get(self, request: Request) -> EventSourceResponse:
        """Return the stream of `events`."""
        return EventSourceResponse(self.events(request), **self.options)
