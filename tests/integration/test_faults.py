"""Two nodes on an engine to which something happens: nobody loses an event silently, or gets it twice.

A sample of it unless ``ASGI_SSE_FAULTS`` is ``full``.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from engines import ENGINES, Valkey
from faults import Cluster

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from engines import Engine

FULL = os.environ.get("ASGI_SSE_FAULTS") == "full"
CLIENTS, RATE = (200, 500) if FULL else (20, 100)
SECONDS = 3.0 if FULL else 0.5  # before the fault, and after it
DOWN = 1.0 if FULL else 0.3
LIMIT = 100.0  # MB: a history of 1,000 events of ten channels, and what waits for an engine that stands still


@dataclass(frozen=True)
class Fault:
    """What happens.

    Attributes:
        happens: It returns when it is over.
        again: Whether publishers give keys, and try again with the same one.
        resets: Whether clients may have to be told that they have missed something.
        lossy: Whether the engine may lose what it has.
        proxied: Whether it needs a proxy.
    """

    happens: Callable[[Cluster], Awaitable[None]]
    again: bool = True
    resets: bool = False
    lossy: bool = False
    proxied: bool = False


async def kill_and_restart(cluster: Cluster, *, empty: bool = False) -> None:
    await asyncio.to_thread(cluster.engine.kill)
    await asyncio.sleep(DOWN)
    await asyncio.to_thread(cluster.engine.restart, empty=empty)


async def kill_and_restart_empty(cluster: Cluster) -> None:
    await kill_and_restart(cluster, empty=True)


async def kill_and_restart_with_less(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.engine.save)
    await asyncio.sleep(0.5)
    await asyncio.to_thread(cluster.engine.kill)
    await asyncio.sleep(DOWN)
    await asyncio.to_thread(cluster.engine.restart, saved=True)


async def pause(cluster: Cluster, seconds: float = 10) -> None:
    cluster.engine.pause()
    try:
        await asyncio.sleep(seconds)
    finally:
        cluster.engine.resume()


async def cut(cluster: Cluster, times: int = 10) -> None:
    for number in range(times):
        for proxy in cluster.proxies:
            await proxy.cut("to the engine" if number % 2 else "to the node")
        await asyncio.sleep(random.uniform(0, 0.5))


async def trim(cluster: Cluster) -> None:
    """A node that is cut off finds that what it has missed is kept no more."""
    proxy = random.choice(cluster.proxies)
    await proxy.shut()
    await asyncio.sleep(1)
    await asyncio.to_thread(cluster.engine.trim)
    await proxy.open()


async def flush(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.engine.flush)


async def flush_scripts(cluster: Cluster) -> None:
    assert isinstance(cluster.engine, Valkey)
    for _ in range(5):
        await asyncio.to_thread(cluster.engine.flush_scripts)
        await asyncio.sleep(0.1)


async def kill_node(cluster: Cluster) -> None:
    await asyncio.to_thread(cluster.nodes[1].kill)


FAULTS = {
    "killed_and_restarted_with_its_data": Fault(kill_and_restart, again=False),
    "killed_and_restarted_empty": Fault(kill_and_restart_empty, again=False, resets=True, lossy=True),
    "killed_and_restarted_with_less": Fault(kill_and_restart_with_less, again=False, resets=True, lossy=True),
    "paused_10s": Fault(pause),
    "connection_cut": Fault(cut, proxied=True),
    "connection_cut_without_keys": Fault(cut, again=False, proxied=True),
    "history_trimmed": Fault(trim, resets=True, proxied=True),
    "flushed": Fault(flush, resets=True, lossy=True),
    "script_cache_flushed": Fault(flush_scripts, again=False),
    "node_killed": Fault(kill_node, again=False),
}


@pytest.mark.parametrize("name", FAULTS if FULL else list(FAULTS)[:1])
@pytest.mark.parametrize("kind", ENGINES)
def test_fault(kind: type[Engine], name: str, tmp_path: Path) -> None:
    if not kind.available():
        pytest.skip(f"{kind.name} is not installed")
    if name == "script_cache_flushed" and not issubclass(kind, Valkey):
        pytest.skip(f"{kind.name} has no scripts")
    with kind(tmp_path) as engine:
        asyncio.run(asyncio.wait_for(happen(engine, name, FAULTS[name], tmp_path), 300))


async def happen(engine: Engine, name: str, fault: Fault, directory: Path) -> None:
    # One client in five comes and goes all the time; the others notice if a connection is of no use any more.
    cluster = Cluster(
        engine, directory, CLIENTS, lambda number: 1.0 if number % 5 == 4 else None, proxied=fault.proxied
    )
    async with cluster:
        await cluster.begin(RATE, again=fault.again)
        await cluster.recovery()
        await asyncio.sleep(SECONDS)
        before = max(cluster.rss())
        await fault.happens(cluster)
        seconds = await cluster.recovery()
        await asyncio.sleep(SECONDS)
        await cluster.finish()
        growth = max(cluster.rss()) - before
        figures = [await cluster.figures(node) for node in cluster.nodes if node.runs]
    verdict = cluster.verdict()
    print(f"{engine.name}, {name}: recovered in {seconds:.2f} s; {verdict}; {growth:.0f} MB more")
    verdict.assert_good()
    assert growth < LIMIT
    assert all(each["state"] == "connected" and each["publishing"] == 0 for each in figures), figures
    assert fault.resets or verdict.resets == 0, cluster.logs()
    assert fault.lossy or verdict.again == 0
    assert "Traceback" not in cluster.logs(), cluster.logs()
