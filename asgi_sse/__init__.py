"""Server-Sent Events for any ASGI app, that stay up, resume, and end cleanly."""

from .broker import Access, Broker, Channel, Run, Subscription
from .errors import (
    BrokerError,
    CompressionError,
    InvalidEventError,
    SendTimeoutError,
    SSEError,
    StreamClosedError,
)
from .middleware.app import create_app
from .middleware.middleware import SSEMiddleware
from .protocol.decoder import EventDecoder
from .protocol.event import JSONServerSentEvent, ServerSentEvent
from .routing.cors import CORS
from .routing.endpoint import HTTPError, Request
from .stream.registry import DrainReport, StreamRegistry
from .stream.response import EventSourceResponse

__version__ = "0.1.0.dev0"

__all__ = [
    "CORS",
    "Access",
    "Broker",
    "BrokerError",
    "Channel",
    "CompressionError",
    "DrainReport",
    "EventDecoder",
    "EventSourceResponse",
    "HTTPError",
    "InvalidEventError",
    "JSONServerSentEvent",
    "Request",
    "Run",
    "SSEError",
    "SSEMiddleware",
    "SendTimeoutError",
    "ServerSentEvent",
    "StreamClosedError",
    "StreamRegistry",
    "Subscription",
    "create_app",
]
