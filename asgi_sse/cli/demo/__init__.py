"""The demo that ``python -m asgi_sse`` serves: a page that shows what streams can do."""
