"""In-process tests of event streams, on asyncio and trio, without a server, a port or a thread.

httpx's ``ASGITransport`` and Starlette's ``TestClient`` return a response only after the app has returned. So they hang
on an endless stream. Here the app runs beside the test.
"""

from .clock import VirtualTimeLoop, virtual_time
from .matching import assert_event
from .server import RunningApp, running
from .stream import OpenStream, open_stream
from .transport import StreamingASGITransport

__all__ = [
    "OpenStream",
    "RunningApp",
    "StreamingASGITransport",
    "VirtualTimeLoop",
    "assert_event",
    "open_stream",
    "running",
    "virtual_time",
]
