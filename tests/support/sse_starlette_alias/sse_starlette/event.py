from asgi_sse.adapters.sse_starlette import JSONServerSentEvent, ServerSentEvent, ensure_bytes

__all__ = ["JSONServerSentEvent", "ServerSentEvent", "ensure_bytes"]
