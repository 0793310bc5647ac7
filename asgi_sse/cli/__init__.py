"""The command ``asgi-sse``: its demo, its hub and its tools for streams of any server."""
