"""`EventSourceResponse`: an event stream as a plain ASGI callable."""

import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn, Unpack

import anyio

from asgi_sse.errors import SendTimeoutError, StreamClosedError
from asgi_sse.protocol.asgi import Message, Receive, Scope, Send
from asgi_sse.protocol.event import ItemEncoder, ServerSentEvent, encode_item
from asgi_sse.protocol.headers import Headers, event_stream_headers
from asgi_sse.runtime.compressors import check_headers_later
from asgi_sse.runtime.server import Server, server_of

from .draining import DrainingEvent
from .options import DEFAULT_OPTIONS, StreamArguments, StreamOptions, given_options
from .receiver import RequestReceiver
from .registry import StreamRegistry, check_registry, default_registry
from .source import check_content, iterate
from .stream import Stream

logger: Final = logging.getLogger(__name__)

SCOPE_KEY: Final = "asgi_sse"
"""The key of a request's scope that holds the `AppContext` of the surrounding app."""

_NO_BODY: Final = frozenset({204, 205, 304})

RESPONDER_KEY: Final = "asgi_sse.middleware.responder"
"""The key of a request's scope that holds the responder of the surrounding middleware."""

current_scope: Final[ContextVar[Scope | None]] = ContextVar("asgi_sse scope", default=None)
"""The current request of a wrapped app, for frameworks that hide it from their responses."""


@dataclass(frozen=True, slots=True)
class AppContext:
    """The registry and the default options that an app gives to its streams."""

    registry: StreamRegistry
    options: StreamOptions
    watch: bool = True  # whether to watch for the server's shutdown
    guard: bool = True  # whether to look for compressors


def registry_of(scope: Scope) -> StreamRegistry:
    """Return the registry for streams that answer this request and were given none."""
    defaults: AppContext | None = scope.get(SCOPE_KEY)
    return default_registry() if defaults is None else defaults.registry


_NO_OPTIONS: Final[dict[str, Any]] = {}  # shared by all responses that are given none
_OTHER_ARGUMENTS: Final = ("status_code", "headers", "registry")
_HINT: Final = (
    "An asgi_sse.EventSourceResponse is an ASGI app: it answers when it is called. Where a framework accepts only "
    "responses of its own, return the EventSourceResponse of asgi_sse.adapters.sse_starlette (Starlette, FastAPI), "
    "asgi_sse.adapters.django, asgi_sse.adapters.quart or asgi_sse.adapters.litestar"
)


class ResponseArguments(StreamArguments, total=False):
    """The options of a stream and its registry, for adapters that pass them on to `EventSourceResponse`."""

    registry: StreamRegistry | None


class EventSourceResponse:
    """A response that streams events: an ASGI callable, for one request.

    An option that is not given, or is ``...``, takes the default of the surrounding app or middleware, or else the
    one named here.

    Args:
        content: The source: an async generator or any async iterable, which is closed at the end; or an
            iterable, which runs in a thread of its own unless it is a list or a tuple. Each item is a
            `ServerSentEvent`, a ``dict`` of its arguments, ``str``, ``int``, or encoded ``bytes``.
        status_code: The status. Browsers accept only 200.
        headers: More headers, or replacements for ``Content-Type: text/event-stream``,
            ``Cache-Control: no-store, no-transform`` and ``X-Accel-Buffering: no``.
        ping: Seconds after which an idle stream sends a keep-alive. Proxies then keep the stream open, and a
            vanished client is noticed. ``0`` or ``None``: never. Default: 15.
        ping_message_factory: Makes the keep-alive: a `ServerSentEvent` or any other item. Default: a comment.
        sep: The line end: LF, CRLF or CR. Default: LF.
        retry: The reconnection time in milliseconds, sent when the stream opens; ``None``: not sent.
            Default: 3000.
        send_timeout: Seconds that the client may take for one message before it is dropped; ``None`` or ``0``: no
            limit. Default: 30.
        max_lifetime: Seconds after which the stream ends and the client reconnects, minus up to a fifth at random;
            ``None`` or ``0``: no limit. Default: ``None``.
        cleanup_timeout: Seconds that the source has for its clean-up before it is abandoned.
            Default: 10.
        open_timeout: Seconds that the response start waits for the first item, so that an early error has a status of
            its own. ``0``: until the source first waits. Default: 0.
        opening_comment: Whether a comment opens the stream, which makes servers and proxies flush. Default: True.
        on_error: Called with the error of a source that raises after the response start. Returns a last event for the
            client, or ``None``. The body is cut all the same, and the call raises the error.
        on_close: Called once, after the source's clean-up, with the reason for the end: ``finished``,
            ``disconnected``, ``drained``, ``timed_out``, ``overflowed``, ``failed`` or ``expired``.
            Sync or async.
        json_dumps: Serialises the JSON value in the ``data`` of a ``dict``. Default: compact JSON.
        registry: The registry of the stream. Default: that of the surrounding app, or of the event loop.

    Attributes:
        status_code: The status.
        raw_headers: The headers as they are sent: pairs of a lower-case name and a value, as bytes.

    Raises:
        TypeError: `content` is not iterable, or an option has the wrong type.
        ValueError: An option is out of range, or a header cannot be sent.
    """

    __slots__ = (
        "__weakref__",
        "_content",
        "_given",
        "_options",
        "_registry",
        "encoder",
        "feeder",
        "raw_headers",
        "status_code",
        "stream",
        "unbuffered",
    )  # fmt: skip

    _content: AsyncIterable[Any] | Iterable[Any] | None

    def __init__(
        self,
        content: AsyncIterable[Any] | Iterable[Any],
        *,
        status_code: int = 200,
        headers: Headers | None = None,
        registry: StreamRegistry | None = None,
        **options: Unpack[StreamArguments],
    ) -> None:
        self._content = None
        check_content(content)
        self._given = given_options(options, _OTHER_ARGUMENTS) if options else _NO_OPTIONS
        self._options = replace(DEFAULT_OPTIONS, **self._given) if self._given else DEFAULT_OPTIONS  # checked now
        if registry is not None:
            check_registry(registry)
        self.status_code: int = _check_status(status_code)
        self.raw_headers: Sequence[tuple[bytes, bytes]] = event_stream_headers(headers)
        self.encoder: ItemEncoder = encode_item
        self.unbuffered: bool = False
        self.feeder: Callable[[], Awaitable[None]] | None = None
        self.stream: Stream | None = None
        self._registry = registry
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request. Return when the stream is over and its source is cleaned up.

        Raises:
            StreamClosedError: The response was already sent.
            SendTimeoutError: The client read nothing for ``send_timeout`` seconds, and the server offers no way to
                drop it.
            Exception: The source raised it.
        """
        if scope["type"] != "http":
            raise TypeError(
                f"scope type must be 'http', got {scope['type']!r}; an event stream answers HTTP requests only"
            )
        responder = scope.get(RESPONDER_KEY)
        server = server_of(send) if responder is None else responder.server
        await self.serve(scope, RequestReceiver(receive), send, server, DrainingEvent())

    @property
    def opened(self) -> bool:
        """Whether the response start is sent, or is about to be. No other status is possible after that."""
        return self.stream is not None and self.stream.opened

    if not TYPE_CHECKING:  # otherwise type checkers would accept any attribute

        def __getattr__(self, name: str) -> NoReturn:
            # A framework took this for a response of its own: Django asks for ``headers``. FastAPI would make JSON of
            # it with ``dict()`` or else ``vars()``. The first asks for ``keys``; the second finds nothing.
            if name == "keys":
                raise TypeError(_HINT)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}. {_HINT}")

    def __del__(self) -> None:
        with suppress(AttributeError):  # a subclass may have failed before this constructor
            if self._content is not None:
                logger.warning("an EventSourceResponse was created but never sent. %s", _HINT)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> NoReturn:
        # FastAPI makes a model of the annotated return type, unless it is a response class of its own.
        raise TypeError(_HINT)

    def serve(
        self, scope: Scope, receiver: RequestReceiver, send: Send, server: Server, draining: DrainingEvent
    ) -> Awaitable[None]:
        """Answer a request whose body may already be read in part.

        It is not a coroutine function, because each idle stream would keep its frame.
        """
        content, self._content = self._content, None
        if content is None:
            raise StreamClosedError("this response was already sent; make a new one for each request")
        defaults: AppContext | None = scope.get(SCOPE_KEY)
        options = self._options
        if defaults is not None:
            options = replace(defaults.options, **self._given) if self._given else defaults.options
        registry = registry_of(scope) if self._registry is None else self._registry
        pull_source: Any = content if hasattr(content, "as_pull_source") else None
        source: Any = content if pull_source is not None else iterate(content)
        head: Message = {"type": "http.response.start", "status": self.status_code, "headers": list(self.raw_headers)}
        if scope["method"].upper() == "HEAD":
            return _send_at_once(send, head, b"", options.send_timeout, source)
        if defaults is None or defaults.watch:
            registry.watch(server)
        if registry.is_draining(server):  # a 503 would stop an EventSource for good
            farewell = ServerSentEvent(retry=registry.reconnection_time()).encode(options.sep)
            return _send_at_once(send, head, farewell, options.send_timeout, source)
        responder = scope.get(RESPONDER_KEY)
        if pull_source is not None:
            pull_source = pull_source.as_pull_source()
            draining.watched = draining.watched or pull_source.patient
        self.stream = Stream(
            None if pull_source is not None else source,
            head=head,
            path=scope["path"],
            client=scope.get("client"),
            receiver=receiver,
            send=send,
            connection=send if responder is None else responder.connection,
            server=server,
            options=options,
            host=registry,
            draining=draining,
            encoder=self.encoder,
            unbuffered=self.unbuffered,
            pull_source=pull_source,
        )
        if responder is not None:
            responder.watch_stream(self.stream)
        elif defaults is None or defaults.guard:
            check_headers_later(head["headers"], send, server.loop, scope["path"], registry.count_compressed)
        if self.feeder is not None:
            self.stream.start_helper(self.feeder)
        return self.stream.run()


async def _send_at_once(send: Send, head: Message, body: bytes, timeout: float | None, source: Any) -> None:
    close = getattr(source, "aclose", None)
    if close is not None:
        await close()
    try:
        with anyio.fail_after(timeout or None):
            await send(head)
            await send({"type": "http.response.body", "body": body, "more_body": False})
    except TimeoutError as exc:
        raise SendTimeoutError(f"the client read nothing for {timeout} s") from exc


def _check_status(status: int) -> int:
    if not isinstance(status, int) or isinstance(status, bool) or not 200 <= status <= 599 or status in _NO_BODY:
        raise ValueError(
            f"status_code must be an int from 200 to 599 with a body, got {status!r}; browsers accept only 200"
        )
    return int(status)
