"""Serve one app on one port with uvicorn, for the demo and the hub."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import uvicorn

from asgi_sse.protocol.asgi import ASGIApp

from .output import EXIT_INTERRUPTED, fail, print_result


@asynccontextmanager
async def _no_context() -> AsyncIterator[None]:
    yield


def serve(
    app: ASGIApp,
    host: str,
    port: int,
    started_message: Callable[[str], str],
    *,
    during_startup: Callable[[], AbstractAsyncContextManager[Any]] = _no_context,
    **options: Any,
) -> int:
    """Serve `app` until a signal stops the server.

    Args:
        app: The app.
        host: The address to listen on.
        port: The port to listen on; 0 picks a free one.
        started_message: Returns the text to print once the server listens, from the server's URL.
        during_startup: Returns a context that spans the app's startup. Its exceptions propagate.
        **options: Options of ``uvicorn.Config``.

    Returns:
        The exit status.
    """
    try:
        # uvicorn would log a port that is in use and exit by itself. This way the command prints one line.
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as exc:
        # Python appends " (while attempting to bind on address …)", which the message already says.
        reason, *_ = (getattr(exc, "strerror", None) or str(exc)).partition(" (while")
        return fail(f"cannot listen on {host} port {port}: {reason}; give another --host or --port")
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            async with during_startup():
                await super().startup(sockets)
            print_result(started_message(url))

    with listener:
        # The access log would show the query, and with it the tokens of clients that cannot send a header.
        Server(uvicorn.Config(app, access_log=False, **options)).run(sockets=[listener])
    # uvicorn raises the signal that stopped it again, which ends this process. Execution only gets here if the parent
    # process made this one ignore SIGINT.
    return EXIT_INTERRUPTED
