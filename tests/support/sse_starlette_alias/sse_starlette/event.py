"""The module ``sse_starlette.event`` for sse-starlette's own tests."""

from asgi_sse.adapters.sse_starlette import JSONServerSentEvent, ServerSentEvent, ensure_bytes

__all__ = ["JSONServerSentEvent", "ServerSentEvent", "ensure_bytes"]
