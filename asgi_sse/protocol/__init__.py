"""Pure values without I/O: events, the decoder, ASGI types and argument checks."""
