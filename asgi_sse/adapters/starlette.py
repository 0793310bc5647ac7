"""A deprecated name of `asgi_sse.adapters.sse_starlette`, the drop-in for sse-starlette."""

import warnings

from .sse_starlette import (
    AppStatus,
    EventSourceEndpoint,
    EventSourceResponse,
    JSONServerSentEvent,
    SendTimeoutError,
    ServerSentEvent,
    ensure_bytes,
)

__all__ = [
    "AppStatus",
    "EventSourceEndpoint",
    "EventSourceResponse",
    "JSONServerSentEvent",
    "SendTimeoutError",
    "ServerSentEvent",
    "ensure_bytes",
]

warnings.warn(
    "asgi_sse.adapters.starlette is deprecated; import from asgi_sse.adapters.sse_starlette",
    DeprecationWarning,
    stacklevel=2,
)
