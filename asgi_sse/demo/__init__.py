"""The demo that ``python -m asgi_sse`` serves: this machine's load, live."""
