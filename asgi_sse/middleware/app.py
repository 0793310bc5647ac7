"""`create_app`: an ASGI app of event streams and nothing else."""

from collections.abc import Mapping
from typing import Any

from asgi_sse.protocol.asgi import Receive, Scope, Send
from asgi_sse.routing.endpoint import send_text
from asgi_sse.routing.request import HTTPError

from .middleware import SSEMiddleware


def create_app(routes: Mapping[str, Any], **options: Any) -> SSEMiddleware:
    """An ASGI app that serves event streams, and answers 404 to all else.

    Args:
        routes: As of `SSEMiddleware`.
        **options: As of `SSEMiddleware`.

    Raises:
        TypeError: As `SSEMiddleware`.
        ValueError: As `SSEMiddleware`.
    """
    return SSEMiddleware(_nothing_else, routes, **options)


async def _nothing_else(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})  # before it is accepted: a 403
    elif scope["type"] == "http":
        await send_text(scope, send, HTTPError(404))
    else:
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
