"""``sse_starlette``, as its own tests import it: all of it is our adapter."""

from asgi_sse.adapters.sse_starlette import EventSourceResponse, JSONServerSentEvent, ServerSentEvent

__all__ = ["EventSourceResponse", "JSONServerSentEvent", "ServerSentEvent"]
