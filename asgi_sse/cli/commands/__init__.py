"""The commands of ``asgi-sse``, one module each."""
