"""`SSEMiddleware`: event streams beside any ASGI app, and their end when its server stops."""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any, Final

from asgiref.compatibility import guarantee_single_callable

from . import lifespan
from ._types import ASGIApp, Receive, Scope, Send
from .options import StreamOptions
from .registry import StreamRegistry
from .response import SCOPE_KEY, Defaults
from .routing import RouteTable, route_path
from .server import server_of

_OPTIONS: Final = tuple(field.name for field in fields(StreamOptions))


class SSEMiddleware:
    """Serves routes of event streams beside an app, and ends all streams under it when the server stops.

    Everything else goes to the app untouched. Every `EventSourceResponse` that the app returns runs in
    the same registry, with the same defaults.

    Args:
        app: Any ASGI app. If it has no lifespan, as Django, that is answered in its place.
        routes: Paths such as ``"/events"`` or ``"/users/{name}"``, each with its endpoint: an async or
            sync generator function, or a coroutine function, that takes a `Request` or nothing and
            gives the events or a response; or any ASGI app.
        registry: Where the streams run. Default: a new one.
        signals: Whether to learn of the server's shutdown early, from its signals and its own state.
            Without, an endless stream holds uvicorn and hypercorn unless the registry is drained by call.
        strict_lifespan: Leave the lifespan to the app alone: if it has none, the server is told so.
        **defaults: What `EventSourceResponse` takes about how streams behave (``ping``, ``retry``,
            ``send_timeout``, …), as defaults of all streams.

    Attributes:
        app: The app.
        registry: The streams that run under it.

    Raises:
        TypeError: A name is unknown, or an endpoint is none.
        ValueError: A route cannot be parsed or stands twice, or a default is out of range.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Mapping[str, Any] | None = None,
        *,
        registry: StreamRegistry | None = None,
        signals: bool = True,
        strict_lifespan: bool = False,
        **defaults: Any,
    ) -> None:
        if not callable(app):
            raise TypeError(f"app={app!r} is not an ASGI app; give the app, and the routes after it")
        unknown = [name for name in defaults if name not in _OPTIONS]
        if unknown:
            known = ", ".join(("routes", "registry", "signals", "strict_lifespan", *_OPTIONS))
            raise TypeError(f"there is no option {unknown[0]!r}; there are {known}")
        # Most sources that fail at all fail within a second: until then the head can wait for their status.
        defaults.setdefault("open_timeout", 1.0)
        self.app: ASGIApp = guarantee_single_callable(app)  # type: ignore[no-untyped-call]
        self.registry = StreamRegistry() if registry is None else registry
        self._routes = RouteTable(routes or {})
        self._defaults = Defaults(self.registry, StreamOptions(**defaults), watch=signals)
        self._strict_lifespan = strict_lifespan

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, or the lifespan."""
        if scope["type"] == "http":
            scope[SCOPE_KEY] = self._defaults
            found = self._routes.find(route_path(scope))
            if found is not None:
                app, scope["path_params"] = found
                await app(scope, receive, send)
                return
        elif scope["type"] == "lifespan":
            server = server_of(send)
            await lifespan.chain(
                self.app,
                scope,
                receive,
                send,
                startup=partial(self.registry.start, server),
                shutdown=partial(self.registry.stop, server),
                strict=self._strict_lifespan,
            )
            return
        await self.app(scope, receive, send)
