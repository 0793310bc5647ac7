"""Reaches the socket behind ``send``, where the server lets us, to drop a client that does not read."""

from typing import Any, Final

from ._types import Send

_DEPTH: Final = 4  # hypercorn: HTTPStream.send → H11Protocol.send → TCPServer.writer


def abort_transport(send: Send) -> bool:
    """Close the connection behind `send` at once, unsent bytes and all.

    Knows uvicorn's and hypercorn's HTTP/1.1; an HTTP/2 connection carries other streams and is left
    alone. Best effort: an unknown server, or a ``send`` that some middleware wrapped, gives False.
    """
    owner: Any = getattr(send, "__self__", None)
    for _ in range(_DEPTH):
        if owner is None or type(owner).__name__.startswith("H2"):
            return False
        transport = getattr(owner, "transport", None) or getattr(getattr(owner, "writer", None), "transport", None)
        abort = getattr(transport, "abort", None)
        if callable(abort):
            abort()
            return True
        owner = getattr(getattr(owner, "send", None), "__self__", None)
    return False
