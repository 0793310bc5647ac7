"""Benchmarks of asgi_sse and its peers. No test depends on their figures."""
