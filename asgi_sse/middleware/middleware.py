"""`SSEMiddleware`: serves event streams beside any ASGI app, and ends them when the server stops."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Final, TypeAlias, Unpack

from asgiref.compatibility import guarantee_single_callable

from asgi_sse.broker import Broker
from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import ASGIApp, Receive, Scope, Send
from asgi_sse.routing.cors import CORS, is_preflight
from asgi_sse.routing.endpoint import METHODS, Endpoint, make_route_table
from asgi_sse.routing.routes import route_path
from asgi_sse.runtime import lifespan
from asgi_sse.runtime.compressors import CompressorGuard
from asgi_sse.runtime.server import Server, server_of
from asgi_sse.stream.options import StreamArguments, StreamOptions
from asgi_sse.stream.registry import StreamRegistry, check_registry
from asgi_sse.stream.response import SCOPE_KEY, AppContext

from .responder import Responder, ResponderConfig

Origins: TypeAlias = CORS | str | Iterable[str] | Callable[[str], bool] | None


class MiddlewareOptions(StreamArguments, total=False):
    """The keyword arguments of `SSEMiddleware`, except for the app and its routes."""

    broker: Broker | None
    registry: StreamRegistry | None
    compressors: str
    adopt: bool
    cors: Origins
    signals: bool
    strict_lifespan: bool


_STREAM_OPTIONS: Final = tuple(field.name for field in fields(StreamOptions))
_OWN_OPTIONS: Final = tuple(name for name in MiddlewareOptions.__annotations__ if name not in _STREAM_OPTIONS)
_REGISTRY_OPTIONS: Final = ("drain_timeout", "drain_retry")
_COMPRESSORS: Final = ("bypass", "refuse", "off")
_OPEN_TIMEOUT_S: Final = 1.0
"""The default ``open_timeout`` of streams under a middleware. Most sources that fail do so within a second. Until then,
the response start is held back, so that the error can have its own status."""


class SSEMiddleware:
    """Serves routes of event streams beside an app, and ends all of its streams when the server stops.

    All other requests go to the app unchanged. Every `EventSourceResponse` that the app returns runs in the registry of
    the middleware, with its defaults.

    Args:
        app: Any ASGI app. If the app has no lifespan support, such as Django, the middleware answers for it.
        routes: Paths such as ``"/events"`` or ``"/users/{name}"``, each with its endpoint. An endpoint is an async or
            sync generator function or a coroutine function. It takes a `Request` or nothing, and returns events or a
            response. Any ASGI app is an endpoint too.
        broker: A broker that is opened and closed with the app. Its runs end together with the streams.
        registry: The registry that the streams run in. Default: a new one.
        compressors: What to do about middleware inside the app that compresses event streams, which delays their
            events. ``"bypass"``: remove ``Accept-Encoding`` from requests that accept ``text/event-stream``.
            ``"refuse"``: answer a compressed stream with a 500 that names the middleware. ``"off"``: neither act nor
            search for compressors.
        adopt: Whether to adopt event streams that the app sends without this library. An adopted stream gains
            keep-alive comments, a send timeout, notice of a disconnect, and an end when the server stops.
        cors: Which other origins may read the routes of the middleware: one origin, several, ``"*"``, a function that
            is called with each origin, or a `CORS`. Default: none.
        signals: Whether to learn of the server's shutdown early, from its signals and its own state. Otherwise an
            endless stream keeps uvicorn and hypercorn from stopping, unless you call ``registry.drain()``.
        strict_lifespan: Whether to report to the server that the app has no lifespan support. By default the middleware
            answers in place of the app.
        **defaults: Options of `EventSourceResponse` (``ping``, ``retry``, ``send_timeout``, …), as defaults for all
            streams. The default ``open_timeout`` is 1 second.

    Attributes:
        app: The app.
        registry: The registry that the streams run in.

    Raises:
        TypeError: An option is unknown, or an argument has the wrong type.
        ValueError: A route is invalid or occurs twice, or an option is out of range.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Mapping[str, Any] | None = None,
        *,
        broker: Broker | None = None,
        registry: StreamRegistry | None = None,
        compressors: str = "bypass",
        adopt: bool = True,
        cors: Origins = None,
        signals: bool = True,
        strict_lifespan: bool = False,
        **defaults: Unpack[StreamArguments],
    ) -> None:
        if not callable(app):
            raise TypeError(f"app must be an ASGI app, got {short_repr(app)}; pass the app, and the routes after it")
        options = _stream_options(defaults)
        if broker is not None and not isinstance(broker, Broker):  # a URL is not shown, since it may have a password
            raise TypeError(f"broker must be a Broker, got {type(broker).__name__}; pass Broker(url)")
        if registry is not None:
            check_registry(registry)
        if compressors not in _COMPRESSORS:
            raise ValueError(
                f"compressors must be 'bypass', 'refuse' or 'off', got {short_repr(compressors)}; pass one of these"
            )
        self.app: ASGIApp = guarantee_single_callable(app)  # type: ignore[no-untyped-call]
        self.registry: StreamRegistry = StreamRegistry() if registry is None else registry
        self._routes = make_route_table(routes or {})
        guarded = compressors != "off"
        self._context = AppContext(self.registry, options, watch=signals, guard=guarded)
        self._guard = CompressorGuard(self.app, compressors, self.registry.count_compressed) if guarded else None
        # The app sends what opens an adopted stream and what reports its errors.
        adopted = replace(options, retry=None, opening_comment=False, open_timeout=0, on_error=None)
        self._config = ResponderConfig(self.registry, adopted if adopt else None, watch=signals, guard=self._guard)
        self._cors = cors if cors is None or isinstance(cors, CORS) else CORS(cors)
        self._strict_lifespan = strict_lifespan
        self._broker = broker
        if broker is not None:
            self.registry.when_draining(self._begin_close)
        self._servers: set[Server] = set()  # the servers whose lifespan has opened the broker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, or the lifespan."""
        if scope["type"] == "http":
            scope[SCOPE_KEY] = self._context
            found = self._routes.find(route_path(scope))
            if found is None:
                await self._run_app(self.app, scope, receive, send)
                return
            app, scope["path_params"] = found
            if self._cors is not None:
                if is_preflight(scope):
                    await self._cors.answer_preflight(scope, send, ", ".join(METHODS))
                    return
                send = self._cors.wrap(scope, send)
            if isinstance(app, Endpoint):
                await app(scope, receive, send)
            else:
                await self._run_app(app, scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _run_app(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if self._guard is None and self._config.options is None:
            return app(scope, receive, send)
        if self._guard is not None:
            self._guard.warn_once()
        return Responder(scope, receive, send, self._config).run(app)

    def _begin_close(self, server: Server | None, seconds: float) -> None:
        if self._broker is None:
            return
        if not self._servers:  # no lifespan has opened the broker
            self._broker.begin_close(seconds, self)
        for own in list(self._servers):
            if server is None or server.covers(own) or own.covers(server):
                self._broker.begin_close(seconds, (self, own))

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = server_of(send)

        broker = self._broker

        async def startup() -> None:
            self.registry.start(server)
            if self._guard is not None:
                self._guard.warn_once()
            if broker is not None:
                await broker.open((self, server))
                self._servers.add(server)

        async def close() -> None:
            if broker is not None and server in self._servers:
                self._servers.discard(server)
                await broker.close((self, server))

        async def shutdown() -> None:
            try:
                await self.registry.stop(server)
            finally:
                await close()

        try:
            await lifespan.chain(
                self.app, scope, receive, send, startup=startup, shutdown=shutdown, strict=self._strict_lifespan
            )
        finally:
            await close()  # if the start-up of the app failed, there was no shutdown


def _stream_options(defaults: StreamArguments) -> StreamOptions:
    for name, value in defaults.items():
        if name in _REGISTRY_OPTIONS:
            raise TypeError(
                f"unknown option {name!r}; it is an option of the registry: pass "
                f"registry=StreamRegistry({name}={short_repr(value)})"
            )
        if name not in _STREAM_OPTIONS:
            raise TypeError(
                f"unknown option {name!r}; the options are {', '.join(('routes', *_OWN_OPTIONS, *_STREAM_OPTIONS))}"
            )
    values: dict[str, Any] = {"open_timeout": _OPEN_TIMEOUT_S, **defaults}
    return StreamOptions(**values)
