"""`SSEMiddleware` around any ASGI app, and `create_app`."""
