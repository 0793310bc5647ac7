"""ASGI aliases, as loose as Starlette's, so that any framework's app and any server's callables fit."""

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
    "overflowed",  # the client fell further behind than a channel keeps
    "failed",  # the source, or a callback of the stream, raised
    "expired",  # max_lifetime is over
]
