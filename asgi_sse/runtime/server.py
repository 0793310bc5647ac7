"""What is behind ``send``: the server that a request came through, and the transport of its connection.

Best effort throughout: ASGI has no way to ask, so this looks at the objects of the servers it knows,
through the middlewares that wrap ``send``. What it does not know is no error.
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

logger = logging.getLogger(__name__)

_DEPTH: Final = 24  # of wrappers: hypercorn has three of its own, a stack of middlewares one each
_KNOWN: Final = ("uvicorn.", "hypercorn.", "asgi_sse.testing.")
_SHARED: Final = ("hypercorn.protocol.h2", "hypercorn.protocol.h3", "uvicorn.protocols.http.zttp_h2_impl")


class Server:
    """A server, as far as its requests and its lifespan tell.

    Attributes:
        loop: Its event loop.
    """

    __slots__ = ("__weakref__", "_config", "_instance", "loop")

    def __init__(self, loop: EventLoop, config: Any, instance: Any) -> None:
        self.loop = loop
        self._config = _reference(config)  # weak, since it holds the app
        self._instance = _reference(instance)

    @property
    def config(self) -> Any:
        """Its configuration, which its requests and its lifespan have in common; ``None``: not known."""
        return self._config()

    @property
    def instance(self) -> Any:
        """What only the requests of this one have, of several with one configuration; ``None``: not known."""
        return self._instance()

    def covers(self, other: "Server") -> bool:
        """Whether `other` may be the same server: what is not known of one may be anything."""
        return self.loop is other.loop and _may_be(self.config, other.config) and _may_be(self.instance, other.instance)


def _may_be(one: Any, other: Any) -> bool:
    return one is other or one is None or other is None


def _reference(thing: Any) -> Any:
    try:
        return weakref.ref(thing)
    except TypeError:
        return _unknown


def _unknown() -> None:
    """In place of a weak reference to what is not known."""


_ServersByIds: TypeAlias = "weakref.WeakValueDictionary[tuple[int, int], Server]"


def _no_servers(_loop: EventLoop) -> _ServersByIds:
    return weakref.WeakValueDictionary()


_servers: Final = LoopLocal(_no_servers)


def server_of(send: Send) -> Server:
    """The server behind the ``send`` of a request, or of a lifespan."""
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
            if type(owner).__module__.startswith(_KNOWN):
                # uvicorn's cycle of one request leads to its protocol by a method; its lifespan has a configuration
                # alone. hypercorn's stream has both. The server of tests is its own configuration.
                protocol = getattr(getattr(owner, "on_response", None), "__self__", owner)
                config = getattr(protocol, "config", None)
                if config is not None:
                    return config, getattr(protocol, "server_state", None) or getattr(protocol, "context", None)
    except Exception:  # of a middleware's object that does not like to be looked at
        logger.debug("cannot look behind a %s", type(send).__qualname__, exc_info=True)
    return None, None


def abort_transport(send: Send) -> bool:
    """Close the connection behind `send` at once, unsent bytes and all.

    Knows uvicorn's and hypercorn's HTTP/1.1; a connection of HTTP/2 or HTTP/3 carries other streams and is
    left alone. False: it could not.
    """
    try:
        for owner in unwrap_send(send):
            if type(owner).__module__ in _SHARED:
                return False
            transport = getattr(owner, "transport", None) or getattr(getattr(owner, "writer", None), "transport", None)
            abort = getattr(transport, "abort", None)
            if callable(abort) and not hasattr(transport, "sendto"):  # a datagram's is the whole server's
                abort()
                return True
    except Exception:
        logger.debug("cannot look behind a %s", type(send).__qualname__, exc_info=True)
    return False


def unwrap_send(send: Any) -> Iterator[Any]:
    """Whose ``send`` it is, and whose it calls in turn, from the app to the socket; functions themselves."""
    for _ in range(_DEPTH):
        if isinstance(send, functools.partial):
            send = send.func
        elif isinstance(send, FunctionType):  # a middleware's closure
            yield send
            cells = dict(zip(send.__code__.co_freevars, send.__closure__ or (), strict=True))
            names = sorted((name for name in cells if "send" in name), key=lambda name: name != "send")
            send = _content(cells[names[0]]) if names else None
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
