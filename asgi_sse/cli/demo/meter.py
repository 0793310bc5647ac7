"""The load of this machine, measured with psutil."""

import time
from typing import Any

import psutil


class Meter:
    """Measures this machine. Rates are averages since the previous reading of the same meter.

    `psutil.cpu_percent` is not used, because it keeps one previous reading for the whole process.
    """

    def __init__(self) -> None:
        self._read_at = time.monotonic()
        self._cores = _cores()
        self._traffic = _traffic()

    def read(self) -> dict[str, Any]:
        """Return the current readings; ``None`` for those that this machine does not provide."""
        read_at, cores, traffic = time.monotonic(), _cores(), _traffic()
        seconds = max(read_at - self._read_at, 0.001)
        # Not strict: a core can be switched off between two readings.
        cpu = [_percent(before, now) for before, now in zip(self._cores, cores, strict=False)]
        network = None
        if traffic is not None and self._traffic is not None:
            # The sum falls when an interface disappears.
            network = {name: round(max(0, traffic[name] - self._traffic[name]) / seconds) for name in traffic}
        self._read_at, self._cores, self._traffic = read_at, cores, traffic
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
    """Return the busy and the total seconds of each core."""
    cores = []
    for times in psutil.cpu_times(percpu=True):
        # Linux counts a guest's time in user and nice as well.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        cores.append((total - times.idle - getattr(times, "iowait", 0.0), total))
    return cores


def _percent(before: tuple[float, float], now: tuple[float, float]) -> float:
    busy, total = now[0] - before[0], now[1] - before[1]
    return round(min(max(100 * busy / total, 0.0), 100.0), 1) if total > 0 else 0.0


def _traffic() -> dict[str, int] | None:
    """Return the bytes that this machine received, sent, and sent to itself."""
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
