"""Tests of examples/tail.py: every line arrives once and in order, whatever happens to file, client and server."""
