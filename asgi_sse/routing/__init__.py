"""Requests, routes, endpoints and CORS."""
