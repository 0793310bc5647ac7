"""The demo as an ASGI app: a page, and the stream that feeds it.

``python -m asgi_sse`` serves it, as does any ASGI server: ``hypercorn asgi_sse.demo.app:app``.
"""

import time
from collections.abc import AsyncIterator
from importlib.resources import files
from itertools import count
from typing import Any, Final

import anyio
import psutil

from .._types import Receive, Scope, Send
from ..app import create_app
from ..event import ServerSentEvent
from ..middleware import SSEMiddleware
from ..registry import StreamRegistry
from ..routing import HTTPError, Request, send_text

_INTERVAL: Final = 1.0
_FIRST_INTERVAL: Final = 0.1
"""Seconds that the first figures are measured over: rates need two looks, and the client is waiting."""

_DRAIN_TIMEOUT: Final = 0.5
"""Seconds until a client that does not read is dropped: Ctrl-C is to end the demo within one."""

_PAGE: Final = files("asgi_sse.demo").joinpath("page.html").read_bytes()
_HEADERS: Final = (
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-length", str(len(_PAGE)).encode()),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'",
    ),
)


class Meter:
    """Measures this machine. Its rates are those since it last looked.

    Each client has its own, since `psutil.cpu_percent` remembers one last look for the whole process.
    """

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._cores = _cores()
        self._traffic = _traffic()

    def read(self) -> dict[str, Any]:
        """The figures as of now; ``None`` for what this machine does not tell."""
        at, cores, traffic = time.monotonic(), _cores(), _traffic()
        seconds = max(at - self._at, 0.001)
        cpu = [_percent(then, now) for then, now in zip(self._cores, cores, strict=False)]  # a core can be switched off
        network = None
        if traffic is not None and self._traffic is not None:
            # A counter falls when its interface goes.
            network = {name: round(max(0, traffic[name] - self._traffic[name]) / seconds) for name in traffic}
        self._at, self._cores, self._traffic = at, cores, traffic
        memory = psutil.virtual_memory()
        return {
            "cpu": cpu,
            "memory": {
                "used": memory.total - memory.available,
                "total": memory.total,
                "percent": memory.percent,
            },
            "network": network,
            "load": _load(),
            "rss": psutil.Process().memory_info().rss,
        }


def _cores() -> list[tuple[float, float]]:
    """Seconds that each core was busy, and seconds in all."""
    cores = []
    for times in psutil.cpu_times(percpu=True):
        # Linux counts a guest's time into user and nice as well.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        cores.append((total - times.idle - getattr(times, "iowait", 0.0), total))
    return cores


def _percent(then: tuple[float, float], now: tuple[float, float]) -> float:
    busy, total = now[0] - then[0], now[1] - then[1]
    return round(min(max(100 * busy / total, 0.0), 100.0), 1) if total > 0 else 0.0


def _traffic() -> dict[str, int] | None:
    """Bytes so far, into and out of this machine, and within it."""
    try:
        counters = psutil.net_io_counters(pernic=True)
    except OSError:  # a container without /proc/net
        return None
    loopback = [counters.pop(name) for name in ("lo", "lo0") if name in counters]
    return {
        "in": sum(counter.bytes_recv for counter in counters.values()),
        "out": sum(counter.bytes_sent for counter in counters.values()),
        "loopback": sum(counter.bytes_sent for counter in loopback),
    }


def _load() -> list[float] | None:
    try:
        return [round(load, 2) for load in psutil.getloadavg()]
    except (OSError, AttributeError):
        return None


async def _page(scope: Scope, _receive: Receive, send: Send) -> None:
    if scope["method"] not in ("GET", "HEAD"):
        await send_text(scope, send, HTTPError(405, headers={"allow": "GET, HEAD"}))
        return
    await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else _PAGE, "more_body": False})


def create_demo() -> SSEMiddleware:
    """The demo: the page at ``/``, its stream at ``/figures``."""
    registry = StreamRegistry(drain_timeout=_DRAIN_TIMEOUT)

    async def figures(request: Request) -> AsyncIterator[ServerSentEvent]:
        # What a client missed is of no use to it, so that it resumes the count alone.
        last = (request.last_event_id or "")[:15]
        first = int(last) + 1 if last.isdecimal() else 1
        meter = Meter()
        await anyio.sleep(_FIRST_INTERVAL)
        for number in count(first):
            yield ServerSentEvent({**meter.read(), "streams": len(registry)}, event="figures", id=number)
            await anyio.sleep(_INTERVAL)

    return create_app({"/": _page, "/figures": figures}, registry=registry)


app = create_demo()
