"""Two minutes of clients that come and go, and of faults: nobody loses an event silently, or gets it twice.

Only where ``ASGI_SSE_SOAK`` is ``full``.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import test_faults as faults
from engines import ENGINES, Valkey
from faults import Cluster

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from engines import Engine

SECONDS = 120.0
CLIENTS, RATE = 150, 300
LIMIT = 150.0  # MB, for what it takes to begin, and a full history


async def restart_node(cluster: Cluster) -> None:
    node = random.choice(cluster.nodes)
    await asyncio.to_thread(node.kill)
    await asyncio.sleep(random.uniform(0, 2))
    await asyncio.to_thread(node.start)
    await cluster.begin_on(node, RATE / 2, again=True)


async def pause(cluster: Cluster) -> None:
    await faults.pause(cluster, random.choice([0.5, 4, 7]))  # of which the last one is more than a connection waits


async def cut(cluster: Cluster) -> None:
    await faults.cut(cluster, random.randint(1, 6))


async def cut_one_off(cluster: Cluster) -> None:
    """For so long that the log keeps no more what it has missed, or not quite."""
    proxy = random.choice(cluster.proxies)
    await proxy.shut()
    await asyncio.sleep(random.choice([0.5, 3, 6]))
    await proxy.open()


# How often, of all.
FAULTS: dict[str, tuple[int, Callable[[Cluster], Awaitable[None]]]] = {
    "killed": (3, faults.kill_and_restart),
    "paused": (2, pause),
    "cut": (5, cut),
    "cut off": (3, cut_one_off),
    "node killed": (3, restart_node),
    "scripts flushed": (1, faults.flush_scripts),
    "trimmed": (1, faults.trim),
    "flushed": (1, faults.flush),
    "killed and emptied": (1, faults.kill_and_restart_empty),
    "killed with less": (1, faults.kill_and_restart_with_less),
}
LOSSY = {"trimmed", "flushed", "killed and emptied", "killed with less"}


@pytest.mark.skipif(os.environ.get("ASGI_SSE_SOAK") != "full", reason="ASGI_SSE_SOAK=full")
@pytest.mark.parametrize("kind", ENGINES)
def test_soak(kind: type[Engine], tmp_path: Path) -> None:
    if not kind.available():
        pytest.skip(f"{kind.name} is not installed")
    with kind(tmp_path) as engine:
        asyncio.run(asyncio.wait_for(soak(engine, tmp_path), SECONDS + 300))


async def soak(engine: Engine, directory: Path) -> None:
    # Half of them leave by themselves; the others notice if a connection is of no use any more.
    cluster = Cluster(engine, directory, CLIENTS, lambda number: 1.5 if number // 8 % 2 else None, proxied=True)
    happened: list[str] = []
    resets = Counter[str]()
    seconds: list[float] = []
    chosen = {name: often for name, (often, _) in FAULTS.items() if isinstance(engine, Valkey) or "scripts" not in name}
    async with cluster:
        await cluster.begin(RATE, again=True)
        await cluster.recovery()
        before, peak = max(cluster.rss()), 0.0
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            await asyncio.sleep(random.uniform(0, 3))
            (name,) = random.choices(list(chosen), list(chosen.values()))
            happened.append(name)
            told_before = cluster.resets()
            try:
                await FAULTS[name][1](cluster)
                seconds.append(await cluster.recovery())
            except AssertionError as exc:
                raise AssertionError(f"after {happened}: {exc}") from exc
            resets[name] += cluster.resets() - told_before
            peak = max(peak, *cluster.rss())
        await cluster.finish()
    verdict = cluster.verdict()
    print(
        f"{engine.name}: {SECONDS:.0f} s, {len(happened)} faults {dict(Counter(happened))}; "
        f"recovered in {max(seconds):.2f} s at the most; resets {dict(resets)}; "
        f"{CLIENTS} clients in {sum(client.connections for client in cluster.clients)} connections; {verdict}; "
        f"{peak - before:.0f} MB more"
    )
    verdict.assert_good()
    assert not sum(number for name, number in resets.items() if name not in LOSSY), resets
    assert peak - before < LIMIT
    assert "Traceback" not in cluster.logs(), cluster.logs()
