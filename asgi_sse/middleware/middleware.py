"""`SSEMiddleware`: event streams beside any ASGI app, and their end when its server stops."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Final

from asgiref.compatibility import guarantee_single_callable

from asgi_sse.broker import Broker
from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import ASGIApp, Receive, Scope, Send
from asgi_sse.routing.cors import CORS, is_preflight
from asgi_sse.routing.endpoint import METHODS, Endpoint, make_route_table
from asgi_sse.routing.routes import route_path
from asgi_sse.runtime import lifespan
from asgi_sse.runtime.compressors import Guard
from asgi_sse.runtime.server import Server, server_of
from asgi_sse.stream.options import StreamOptions
from asgi_sse.stream.registry import StreamRegistry, check_registry
from asgi_sse.stream.response import SCOPE_KEY, AppContext

from .responder import Responder, ResponderConfig

_OWN: Final = ("routes", "broker", "registry", "compressors", "adopt", "cors", "signals", "strict_lifespan")
_OPTIONS: Final = tuple(field.name for field in fields(StreamOptions))
_OF_REGISTRY: Final = ("drain_timeout", "drain_retry")
_COMPRESSORS: Final = ("bypass", "refuse", "off")


class SSEMiddleware:
    """Serves routes of event streams beside an app, and ends all streams under it when the server stops.

    Everything else goes to the app untouched. Every `EventSourceResponse` that the app returns runs in
    the same registry, with the same defaults.

    Args:
        app: Any ASGI app. If it has no lifespan, as Django, that is answered in its place.
        routes: Paths such as ``"/events"`` or ``"/users/{name}"``, each with its endpoint: an async or
            sync generator function, or a coroutine function, that takes a `Request` or nothing and
            gives the events or a response; or any ASGI app.
        broker: One that is opened and closed with the app. Its runs are told of the end with the streams.
        registry: Where the streams run. Default: a new one.
        signals: Whether to learn of the server's shutdown early, from its signals and its own state.
            Without, an endless stream holds uvicorn and hypercorn unless the registry is drained by call.
        compressors: What to do about middlewares inside of the app that compress event streams, which holds
            their events back. ``"bypass"``: keep ``Accept-Encoding`` from them where a request accepts
            ``text/event-stream``; ``"refuse"``: answer a stream that was compressed with a 500 that says by
            whom; ``"off"``: nothing, and look for none.
        adopt: Whether to take care of event streams that the app sends by itself: comments that keep them
            alive, a send timeout, a disconnect that reaches them, an end when the server stops.
        cors: Which other origins may read our routes: origins, ``"*"``, a function that is asked of each, or
            `CORS` for more. Default: none.
        strict_lifespan: Leave the lifespan to the app alone: if it has none, the server is told so.
        **defaults: What `EventSourceResponse` takes about how streams behave (``ping``, ``retry``,
            ``send_timeout``, …), as defaults of all streams.

    Attributes:
        app: The app.
        registry: The streams that run under it.

    Raises:
        TypeError: A name is unknown, or an endpoint, `broker` or `registry` is none.
        ValueError: A route cannot be parsed or stands twice, or a default is out of range.
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
        cors: CORS | str | Iterable[str] | Callable[[str], bool] | None = None,
        signals: bool = True,
        strict_lifespan: bool = False,
        **defaults: Any,
    ) -> None:
        if not callable(app):
            raise TypeError(f"app={app!r} is not an ASGI app; give the app, and the routes after it")
        unknown = [name for name in defaults if name not in _OPTIONS]
        if unknown:
            name = unknown[0]
            hint = f"there are {', '.join((*_OWN, *_OPTIONS))}"
            if name in _OF_REGISTRY:
                hint = f"it is of the registry: registry=StreamRegistry({name}={short_repr(defaults[name])})"
            raise TypeError(f"there is no option {name!r}; {hint}")
        if broker is not None and not isinstance(broker, Broker):
            raise TypeError(f"broker={broker!r} is none; give a Broker")
        if registry is not None:
            check_registry(registry)
        if compressors not in _COMPRESSORS:
            raise ValueError(f"compressors={compressors!r}; give one of {', '.join(map(repr, _COMPRESSORS))}")
        # Most sources that fail at all fail within a second: until then the head can wait for their status.
        defaults.setdefault("open_timeout", 1.0)
        self.app: ASGIApp = guarantee_single_callable(app)  # type: ignore[no-untyped-call]
        self.registry = StreamRegistry() if registry is None else registry
        self._routes = make_route_table(routes or {})
        options = StreamOptions(**defaults)
        guarded = compressors != "off"
        self._defaults = AppContext(self.registry, options, watch=signals, guard=guarded)
        self._guard = Guard(self.app, compressors, self.registry.count_compressed) if guarded else None
        adopted = replace(options, retry=None, opening_comment=False, open_timeout=0, on_error=None)
        self._config = ResponderConfig(self.registry, adopted if adopt else None, watch=signals, guard=self._guard)
        self._cors = cors if cors is None or isinstance(cors, CORS) else CORS(cors)
        self._strict_lifespan = strict_lifespan
        self._broker = broker
        if broker is not None:
            self.registry.when_draining(self._draining)
        self._servers: set[Server] = set()  # through which the broker was opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, or the lifespan."""
        if scope["type"] == "http":
            scope[SCOPE_KEY] = self._defaults
            found = self._routes.find(route_path(scope))
            if found is None:
                await self._pass(self.app, scope, receive, send)
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
                await self._pass(app, scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _pass(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if self._guard is None and self._config.options is None:
            return app(scope, receive, send)
        if self._guard is not None:
            self._guard.warn_once()
        return Responder(scope, receive, send, self._config).run(app)

    def _draining(self, server: Server | None, within: float) -> None:
        if self._broker is None:
            return
        if not self._servers:  # without a lifespan, nobody has opened it
            self._broker.begin_close(within, self)
        for own in list(self._servers):
            if server is None or server.covers(own) or own.covers(server):
                self._broker.begin_close(within, (self, own))

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
            await close()  # where the start-up has failed
