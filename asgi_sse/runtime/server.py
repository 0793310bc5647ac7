"""The server of a request, and the transport of its connection, found through ``send``.

ASGI has no way to ask for them. This module follows ``send`` through the middlewares that wrap it, and
looks at the objects of the servers that it knows. An unknown object is not an error.
"""

import functools
import logging
import weakref
from collections.abc import Iterator
from types import FunctionType
from typing import Any, Final, TypeAlias

from asgi_sse.protocol.asgi import Send

from .base import EventLoop
from .current import LoopLocal, current_loop

logger: Final = logging.getLogger(__name__)

_MAX_WRAPPERS: Final = 24  # hypercorn adds three around `send`, and each middleware adds one
_SERVER_MODULES: Final = ("uvicorn.", "hypercorn.", "asgi_sse.testing.")
_SHARED_CONNECTIONS: Final = ("hypercorn.protocol.h2", "hypercorn.protocol.h3", "uvicorn.protocols.http.zttp_h2_impl")


class Server:
    """A server, as far as its requests and its lifespan reveal it.

    Args:
        loop: The server's event loop.
        config: The server's configuration, or ``None`` if it is unknown.
        instance: An object that only this server's requests have, or ``None`` if it is unknown.

    Attributes:
        loop: The server's event loop.
    """

    __slots__ = ("__weakref__", "_config", "_instance", "loop")

    def __init__(self, loop: EventLoop, config: Any, instance: Any) -> None:
        self.loop: EventLoop = loop
        self._config = _reference(config)  # weak, because the configuration holds the app
        self._instance = _reference(instance)

    @property
    def config(self) -> Any:
        """The configuration, which the server's requests and its lifespan share; ``None`` if it is unknown."""
        return self._config()

    @property
    def instance(self) -> Any:
        """An object that tells servers of one configuration apart; the lifespan has none. ``None`` if it is unknown."""
        return self._instance()

    def covers(self, other: "Server") -> bool:
        """Return whether `other` may be the same server. An unknown part matches any."""
        return self.loop is other.loop and _may_be(self.config, other.config) and _may_be(self.instance, other.instance)


def _may_be(one: Any, other: Any) -> bool:
    return one is other or one is None or other is None


def _reference(target: Any) -> Any:
    try:
        return weakref.ref(target)
    except TypeError:
        return _unknown


def _unknown() -> None:
    """Return None; this stands in for a weak reference to an unknown object."""


_ServersByIds: TypeAlias = "weakref.WeakValueDictionary[tuple[int, int], Server]"


def _no_servers(_loop: EventLoop) -> _ServersByIds:
    return weakref.WeakValueDictionary()


_servers: Final = LoopLocal(_no_servers)


def server_of(send: Send) -> Server:
    """Return the server that the ``send`` of a request or of a lifespan belongs to."""
    loop = current_loop()
    servers = _servers.of(loop)
    config, instance = _identify(send)
    key = (id(config), id(instance))
    server = servers.get(key)
    if server is None or server.config is not config or server.instance is not instance:
        server = servers[key] = Server(loop, config, instance)
    return server


def _identify(send: Send) -> tuple[Any, Any]:
    try:
        for owner in unwrap_send(send):
            if type(owner).__module__.startswith(_SERVER_MODULES):
                # uvicorn: the cycle of one request leads to the protocol through a method, and the lifespan has only a
                # configuration. hypercorn: the stream has both. asgi_sse.testing: the server is its own configuration.
                protocol = getattr(getattr(owner, "on_response", None), "__self__", owner)
                config = getattr(protocol, "config", None)
                if config is not None:
                    return config, getattr(protocol, "server_state", None) or getattr(protocol, "context", None)
    except Exception:  # an attribute of a middleware raised
        logger.debug("cannot find the server of a %s", type(send).__qualname__, exc_info=True)
    return None, None


def abort_transport(send: Send) -> bool:
    """Close the connection of `send` at once, and discard its unsent bytes.

    Works for HTTP/1.1 on uvicorn and hypercorn. A connection of HTTP/2 or HTTP/3 carries other streams, so
    it stays open.

    Returns:
        True if the connection was closed.
    """
    try:
        for owner in unwrap_send(send):
            if type(owner).__module__ in _SHARED_CONNECTIONS:
                return False
            transport = getattr(owner, "transport", None) or getattr(getattr(owner, "writer", None), "transport", None)
            abort = getattr(transport, "abort", None)
            if callable(abort) and not hasattr(transport, "sendto"):  # a datagram transport serves all clients
                abort()
                return True
    except Exception:
        logger.debug("cannot find the connection of a %s", type(send).__qualname__, exc_info=True)
    return False


def unwrap_send(send: Any) -> Iterator[Any]:
    """Yield the owner of `send`, then the owner of the ``send`` that it calls, and so on, from the app to the socket.

    A plain function has no owner, so it is yielded itself.
    """
    for _ in range(_MAX_WRAPPERS):
        if isinstance(send, functools.partial):
            send = send.func
        elif isinstance(send, FunctionType):  # the closure of a middleware
            yield send
            cells = dict(zip(send.__code__.co_freevars, send.__closure__ or (), strict=True))
            names = sorted((name for name in cells if "send" in name), key=lambda name: name != "send")
            send = _content(cells[names[0]]) if names else None
        else:
            owner = getattr(send, "__self__", send)  # a method, or a callable object
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
    except ValueError:  # the closure has not filled it yet
        return None
