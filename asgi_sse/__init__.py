"""Server-Sent Events for any ASGI app: streams that resume, cope with slow clients, and end cleanly."""

from .broker import Access, Broker, BrokerStatistics, Channel, Run, Subscription
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
from .routing.request import HTTPError, Request
from .stream.counters import RegistryStatistics
from .stream.drain import DrainReport
from .stream.observer import Observer
from .stream.registry import StreamRegistry
from .stream.response import EventSourceResponse
from .stream.stream import Stream

__version__ = "0.1.0.dev0"

__all__ = [
    "CORS",
    "Access",
    "Broker",
    "BrokerError",
    "BrokerStatistics",
    "Channel",
    "CompressionError",
    "DrainReport",
    "EventDecoder",
    "EventSourceResponse",
    "HTTPError",
    "InvalidEventError",
    "JSONServerSentEvent",
    "Observer",
    "RegistryStatistics",
    "Request",
    "Run",
    "SSEError",
    "SSEMiddleware",
    "SendTimeoutError",
    "ServerSentEvent",
    "Stream",
    "StreamClosedError",
    "StreamRegistry",
    "Subscription",
    "create_app",
]
