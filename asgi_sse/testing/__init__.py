"""Tests of event streams, in-process, on asyncio and trio: no server, no port, no thread.

httpx's ``ASGITransport`` and Starlette's ``TestClient`` run an app to its end before they give its
response, and so hang on an endless stream; here the app runs beside the test.
"""

from .clock import VirtualTimeLoop, virtual_time
from .server import RunningApp, running
from .stream import OpenStream, assert_event, open_stream
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
