"""Type aliases of ASGI, as loose as Starlette's, so that the app of any framework and any server fit them."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Literal, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

CloseReason: TypeAlias = Literal[
    "finished",  # the source ended
    "disconnected",  # the client left, or the server cancelled the request
    "drained",  # the server is stopping
    "timed_out",  # the client did not take a message within send_timeout
    "overflowed",  # the channel's log trimmed events that the client had not read
    "failed",  # the source, or a callback of the stream, raised
    "expired",  # the stream reached its max_lifetime
]
