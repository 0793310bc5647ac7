"""The command ``asgi-sse``: a demo, a hub, and tools for event streams of any server."""
