"""The package ``sse_starlette`` for its own tests: a thin alias of our adapter."""

from asgi_sse.adapters.sse_starlette import EventSourceResponse, JSONServerSentEvent, ServerSentEvent

__all__ = ["EventSourceResponse", "JSONServerSentEvent", "ServerSentEvent"]
