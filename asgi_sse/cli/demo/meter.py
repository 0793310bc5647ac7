"""This machine's load, measured by psutil."""

import time
from typing import Any

import psutil


class Meter:
    """Measures this machine. Its rates are those since it last looked.

    By itself, since `psutil.cpu_percent` remembers one last look for the whole process.
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
