"""`create_app`: an ASGI app that serves event streams only."""

from collections.abc import Mapping
from typing import Any, Unpack

from asgi_sse.protocol.asgi import Receive, Scope, Send
from asgi_sse.routing.endpoint import send_text
from asgi_sse.routing.request import HTTPError

from .middleware import MiddlewareOptions, SSEMiddleware


def create_app(routes: Mapping[str, Any], **options: Unpack[MiddlewareOptions]) -> SSEMiddleware:
    """Return an ASGI app that serves event streams, and answers every other path with a 404.

    Args:
        routes: Paths and their endpoints, as `SSEMiddleware` takes them.
        **options: The keyword arguments of `SSEMiddleware`.

    Returns:
        A middleware around an app without routes. Its attribute ``registry`` holds the running streams.

    Raises:
        TypeError: An option is unknown, an argument has the wrong type, or a value of `routes` is not an endpoint.
        ValueError: A route is invalid or occurs twice, or an option is out of range.
    """
    return SSEMiddleware(_answer_404, routes, **options)


async def _answer_404(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})  # before the accept, which the server answers with a 403
    elif scope["type"] == "http":
        await send_text(scope, send, HTTPError(404))
    else:
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
