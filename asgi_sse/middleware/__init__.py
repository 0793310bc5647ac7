"""`SSEMiddleware`, which wraps any ASGI app, and `create_app`."""
