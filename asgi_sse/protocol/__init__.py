"""Pure values without I/O: events, the decoder, headers, ASGI types and argument checks."""
