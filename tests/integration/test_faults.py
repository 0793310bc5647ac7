"""Two app processes and a fault on each server: no client loses an event silently or receives it twice.

The tests run a sample, unless ``ASGI_SSE_FAULTS`` is ``full``.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from backend_servers import SERVERS, Valkey
from faults import Cluster

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from backend_servers import BackendServer

FULL = os.environ.get("ASGI_SSE_FAULTS") == "full"
CLIENTS, RATE = (200, 500) if FULL else (20, 100)
AROUND_S = 3.0 if FULL else 0.5  # before the fault, and after it
DOWN_S = 1.0 if FULL else 0.3
LIMIT_MB = 100.0  # for the history of 1,000 events in ten channels, and events that wait for a paused server


@dataclass(frozen=True)
class Fault:
    """A fault and what it may cause.

    Attributes:
        inject: Causes the fault, and returns when it is over.
        retry: Whether publishers retry with an idempotency key.
        resets: Whether clients may receive resets.
        lossy: Whether the server may lose events.
        proxied: Whether the fault needs a proxy.
    """

    inject: Callable[[Cluster], Awaitable[None]]
    retry: bool = True
    resets: bool = False
    lossy: bool = False
    proxied: bool = False


async def kill_and_restart(cluster: Cluster, *, empty: bool = False) -> None:
    await asyncio.to_thread(cluster.server.kill)
    await asyncio.sleep(DOWN_S)
    await asyncio.to_thread(cluster.server.restart, empty=empty)


async def kill_and_restart_empty(cluster: Cluster) -> None:
    await kill_and_restart(cluster, empty=True)


async def kill_and_restart_with_less(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.server.save)
    await asyncio.sleep(0.5)
    await asyncio.to_thread(cluster.server.kill)
    await asyncio.sleep(DOWN_S)
    await asyncio.to_thread(cluster.server.restart, saved=True)


async def pause(cluster: Cluster, seconds: float = 10) -> None:
    cluster.server.pause()
    try:
        await asyncio.sleep(seconds)
    finally:
        cluster.server.resume()


async def cut(cluster: Cluster, times: int = 10) -> None:
    for number in range(times):
        for proxy in cluster.proxies:
            await proxy.cut("to the server" if number % 2 else "to the app")
        await asyncio.sleep(random.uniform(0, 0.5))


async def trim(cluster: Cluster) -> None:
    """Cut a process off, and delete the events that it misses."""
    proxy = random.choice(cluster.proxies)
    await proxy.shut()
    await asyncio.sleep(1)
    await asyncio.to_thread(cluster.server.trim)
    await proxy.open()


async def flush(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.server.flush)


async def flush_scripts(cluster: Cluster) -> None:
    assert isinstance(cluster.server, Valkey)
    for _ in range(5):
        await asyncio.to_thread(cluster.server.flush_scripts)
        await asyncio.sleep(0.1)


async def kill_process(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.processes[1].kill)


FAULTS = {
    "killed_and_restarted_with_its_data": Fault(kill_and_restart, retry=False),
    "killed_and_restarted_empty": Fault(kill_and_restart_empty, retry=False, resets=True, lossy=True),
    "killed_and_restarted_with_less": Fault(kill_and_restart_with_less, retry=False, resets=True, lossy=True),
    "paused_10s": Fault(pause),
    "connection_cut": Fault(cut, proxied=True),
    "connection_cut_without_keys": Fault(cut, retry=False, proxied=True),
    "history_trimmed": Fault(trim, resets=True, proxied=True),
    "flushed": Fault(flush, resets=True, lossy=True),
    "script_cache_flushed": Fault(flush_scripts, retry=False),
    "process_killed": Fault(kill_process, retry=False),
}


@pytest.mark.parametrize("name", FAULTS if FULL else list(FAULTS)[:1])
@pytest.mark.parametrize("kind", SERVERS)
def test_fault_loses_no_event_silently_and_doubles_none(kind: type[BackendServer], name: str, tmp_path: Path) -> None:
    if not kind.available():
        pytest.skip(f"{kind.name} is not installed")
    if name == "script_cache_flushed" and not issubclass(kind, Valkey):
        pytest.skip(f"{kind.name} has no scripts")
    with kind(tmp_path) as server:
        asyncio.run(asyncio.wait_for(run_fault(server, name, FAULTS[name], tmp_path), 300))


async def run_fault(server: BackendServer, name: str, fault: Fault, directory: Path) -> None:
    # One client in five reconnects all the time; the others stay until their connection breaks.
    cluster = Cluster(
        server, directory, CLIENTS, lambda number: 1.0 if number % 5 == 4 else None, proxied=fault.proxied
    )
    async with cluster:
        await cluster.begin(RATE, retry=fault.retry)
        await cluster.recovery()
        await asyncio.sleep(AROUND_S)
        before = max(cluster.rss())
        await fault.inject(cluster)
        seconds = await cluster.recovery()
        await asyncio.sleep(AROUND_S)
        await cluster.finish()
        growth = max(cluster.rss()) - before
        statistics = [await cluster.statistics(each) for each in cluster.processes if each.is_running]
    verdict = cluster.verdict()
    print(f"{server.name}, {name}: recovered in {seconds:.2f} s; {verdict}; {growth:.0f} MB more")
    verdict.assert_good()
    assert growth < LIMIT_MB
    assert all(each["state"] == "connected" and each["publishing"] == 0 for each in statistics), statistics
    assert fault.resets or verdict.resets == 0, cluster.logs()
    assert fault.lossy or verdict.repeated == 0
    assert "Traceback" not in cluster.logs(), cluster.logs()
