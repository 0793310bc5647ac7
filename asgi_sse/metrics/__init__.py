"""What can be measured, and its export to Prometheus (`asgi_sse.metrics.prometheus`)."""
