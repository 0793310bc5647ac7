"""Serves an app on one port by uvicorn until a signal ends it: the demo and the hub."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import uvicorn

from asgi_sse.protocol.asgi import ASGIApp

from .frame import INTERRUPTED, fail, say


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


def serve(
    app: ASGIApp,
    host: str,
    port: int,
    told: Callable[[str], str],
    *,
    during_startup: Callable[[], AbstractAsyncContextManager[Any]] = _nothing,
    **options: Any,
) -> int:
    """Serve `app` until a signal ends it.

    Args:
        app: The app.
        host: The address.
        port: The port; 0: any free one.
        told: What to print once it listens at the URL that it is given.
        during_startup: What is entered before the app starts and left when it has. What it raises is raised here.
        **options: As of ``uvicorn.Config``.

    Returns:
        The exit status.
    """
    try:
        # Here and not in uvicorn, which would report a port in use by a log line and an exit of its own.
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as exc:
        reason, *_ = (getattr(exc, "strerror", None) or str(exc)).partition(" (while")  # attempting to bind on …
        return fail(f"cannot listen on {host} port {port}: {reason}; give another --host or --port")
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            async with during_startup():
                await super().startup(sockets)
            say(told(url))

    with listener:
        # Its log of requests is off: it would have the query, and with it the tokens of those who cannot send a header.
        Server(uvicorn.Config(app, access_log=False, **options)).run(sockets=[listener])
    # uvicorn raises the signal again that ended it. Still here: SIGINT, which the parent has made this process ignore.
    return INTERRUPTED
