"""The demo of ``asgi-sse demo``: a page that shows event streams at work."""
