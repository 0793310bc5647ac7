"""What is behind ``send``: the server that a request came through, and the transport of its connection.

Best effort throughout: ASGI has no way to ask, so this looks at the objects of the servers it knows,
through any middleware that wraps ``send``. What it does not know is no error.
"""

import functools
from collections.abc import Iterator
from types import FunctionType
from typing import Any, Final

from anyio.lowlevel import RunVar

from ._eventloop import EventLoop, current_loop
from ._types import Send

_DEPTH: Final = 24  # of wrappers: hypercorn has three of its own, a stack of middlewares one each
_KNOWN: Final = ("uvicorn.", "hypercorn.")


class Server:
    """A server, as far as its requests and its lifespan tell: its event loop, and its configuration if we know it."""

    __slots__ = ("__weakref__", "config", "loop")

    def __init__(self, loop: EventLoop, config: Any) -> None:
        self.loop = loop
        self.config = config

    def covers(self, other: "Server") -> bool:
        """Whether `other` may be the same server: in one event loop, an unknown one may be any."""
        return self.loop is other.loop and (self.config is other.config or self.config is None or other.config is None)


_servers: RunVar[dict[Any, Server]] = RunVar("asgi_sse servers")


def server_of(send: Send) -> Server:
    """The server behind the ``send`` of a request, or of a lifespan; always the same object for the same one."""
    try:
        servers = _servers.get()
    except LookupError:
        servers = {}
        _servers.set(servers)
    try:
        config = next(filter(None, map(_config_of, _behind(send))), None)
    except Exception:  # some middleware's object that does not like to be looked at
        config = None
    if config not in servers:
        servers[config] = Server(current_loop(), config)
    return servers[config]


def _config_of(owner: Any) -> Any:
    """The server's configuration: of all its objects, the one that its requests and its lifespan share."""
    if not type(owner).__module__.startswith(_KNOWN):
        return None
    protocol = getattr(getattr(owner, "on_response", None), "__self__", None)  # of uvicorn's cycle of one request
    return getattr(owner, "config", None) or getattr(protocol, "config", None)


def abort_transport(send: Send) -> bool:
    """Close the connection behind `send` at once, unsent bytes and all.

    Knows uvicorn's and hypercorn's HTTP/1.1; an HTTP/2 connection carries other streams and is left
    alone. False: it could not.
    """
    for owner in _behind(send):
        if "h2" in type(owner).__module__.rpartition(".")[2]:
            return False
        transport = getattr(owner, "transport", None) or getattr(getattr(owner, "writer", None), "transport", None)
        abort = getattr(transport, "abort", None)
        if callable(abort):
            abort()
            return True
    return False


def _behind(send: Any) -> Iterator[Any]:
    """Whose ``send`` it is, and whose it calls in turn, from the app to the socket."""
    for _ in range(_DEPTH):
        if isinstance(send, functools.partial):
            send = send.func
        elif isinstance(send, FunctionType):  # a middleware's closure
            cells = zip(send.__code__.co_freevars, send.__closure__ or (), strict=True)
            send = next((_content(cell) for name, cell in cells if "send" in name), None)
        else:
            owner = getattr(send, "__self__", send)  # a method, or an object that is called
            if owner is None:
                return
            yield owner
            following = getattr(owner, "send", None) or getattr(owner, "_send", None)
            if getattr(following, "__self__", following) is owner:
                return
            send = following


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
