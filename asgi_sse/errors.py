"""The errors that asgi_sse raises, each naming the value, what is wrong with it and what to do."""


class SSEError(Exception):
    """Base of every error that asgi_sse raises on its own account."""


class InvalidEventError(SSEError, ValueError):
    """An event that no client could read as meant: refused when it is built, or too large to decode."""


class SendTimeoutError(SSEError, TimeoutError):
    """The client did not take a message within ``send_timeout`` seconds."""


class StreamClosedError(SSEError):
    """The stream, or the request that it answers, is over."""


class CompressionError(SSEError):
    """A middleware would compress, hold or buffer the stream."""


class BrokerError(SSEError):
    """A broker could not do what was asked of it."""
