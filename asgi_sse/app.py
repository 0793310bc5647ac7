"""`create_app`: an ASGI app of event streams and nothing else."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from . import lifespan
from ._types import Receive, Scope, Send
from .options import StreamOptions
from .registry import StreamRegistry
from .response import SCOPE_KEY, Defaults
from .routing import HTTPError, RouteTable, route_path, send_text


class SSEApp:
    """The app that `create_app` makes.

    Attributes:
        registry: The streams that it runs.
    """

    def __init__(self, routes: Mapping[str, Any], registry: StreamRegistry, options: StreamOptions) -> None:
        self.registry = registry
        self._routes = RouteTable(routes)
        self._defaults = Defaults(registry, options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, or the lifespan."""
        if scope["type"] == "lifespan":
            await lifespan.answer(receive, send, startup=self.registry.reopen, shutdown=self.registry.drain)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})  # before it is accepted: a 403
        elif (found := self._routes.find(route_path(scope))) is None:
            await send_text(scope, send, HTTPError(404))
        else:
            app, scope["path_params"] = found
            scope[SCOPE_KEY] = self._defaults
            await app(scope, receive, send)


def create_app(routes: Mapping[str, Any], *, registry: StreamRegistry | None = None, **defaults: Any) -> SSEApp:
    """An ASGI app that serves event streams.

    Args:
        routes: Paths such as ``"/events"`` or ``"/users/{name}"``, each with its endpoint: an async or
            sync generator function, or a coroutine function, that takes a `Request` or nothing and
            gives the events or a response; or any ASGI app.
        registry: Where its streams run. Default: a new one.
        **defaults: What `EventSourceResponse` takes about how streams behave (``ping``, ``retry``,
            ``send_timeout``, …), as defaults of all streams.

    Raises:
        TypeError: A name is unknown, or an endpoint is none.
        ValueError: A route cannot be parsed or stands twice, or a default is out of range.
    """
    # Most sources that fail at all fail within a second: until then the head can wait for their status.
    defaults.setdefault("open_timeout", 1.0)
    known = [field.name for field in fields(StreamOptions)]
    for name in defaults:
        if name not in known:
            raise TypeError(f"create_app() takes no {name!r}; beside routes and registry it takes {', '.join(known)}")
    return SSEApp(routes, StreamRegistry() if registry is None else registry, StreamOptions(**defaults))
