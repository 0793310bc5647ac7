"""Instruments of streams and brokers, and their export to Prometheus (`asgi_sse.metrics.prometheus`)."""
