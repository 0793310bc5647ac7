"""Requests, routes, endpoints and cross-origin rules."""
