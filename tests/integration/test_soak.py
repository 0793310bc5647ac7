"""Two minutes of random faults and reconnecting clients: no client loses an event silently or receives it twice.

The test is skipped unless ``ASGI_SSE_SOAK`` is ``full``.
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
from backend_servers import SERVERS, Valkey
from faults import Cluster

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from backend_servers import BackendServer

DURATION_S = 120.0
CLIENTS, RATE = 150, 300
LIMIT_MB = 150.0  # for the start, and a full history


async def restart_process(cluster: Cluster) -> None:
    process = random.choice(cluster.processes)
    await asyncio.to_thread(process.kill)
    await asyncio.sleep(random.uniform(0, 2))
    await asyncio.to_thread(process.start)
    await cluster.begin_on(process, RATE / 2, retry=True)


async def pause(cluster: Cluster) -> None:
    await faults.pause(cluster, random.choice([0.5, 4, 7]))  # the last one exceeds the timeout of a connection


async def cut(cluster: Cluster) -> None:
    await faults.cut(cluster, random.randint(1, 6))


async def cut_one_off(cluster: Cluster) -> None:
    """Cut one process off, for longer or shorter than the log keeps the events that it misses."""
    proxy = random.choice(cluster.proxies)
    await proxy.shut()
    await asyncio.sleep(random.choice([0.5, 3, 6]))
    await proxy.open()


# Each fault with its weight in the random choice.
FAULTS: dict[str, tuple[int, Callable[[Cluster], Awaitable[None]]]] = {
    "killed": (3, faults.kill_and_restart),
    "paused": (2, pause),
    "cut": (5, cut),
    "cut off": (3, cut_one_off),
    "process killed": (3, restart_process),
    "scripts flushed": (1, faults.flush_scripts),
    "trimmed": (1, faults.trim),
    "flushed": (1, faults.flush),
    "killed and emptied": (1, faults.kill_and_restart_empty),
    "killed with less": (1, faults.kill_and_restart_with_less),
}
LOSSY = {"trimmed", "flushed", "killed and emptied", "killed with less"}


@pytest.mark.skipif(os.environ.get("ASGI_SSE_SOAK") != "full", reason="ASGI_SSE_SOAK=full")
@pytest.mark.parametrize("kind", SERVERS)
def test_random_faults_lose_no_event_silently_and_double_none(kind: type[BackendServer], tmp_path: Path) -> None:
    if not kind.available():
        pytest.skip(f"{kind.name} is not installed")
    with kind(tmp_path) as server:
        asyncio.run(asyncio.wait_for(soak(server, tmp_path), DURATION_S + 300))


async def soak(server: BackendServer, directory: Path) -> None:
    # Half of the clients reconnect by themselves; the others stay until their connection breaks.
    cluster = Cluster(server, directory, CLIENTS, lambda number: 1.5 if number // 8 % 2 else None, proxied=True)
    happened: list[str] = []
    resets = Counter[str]()
    seconds: list[float] = []
    chosen = {
        name: weight for name, (weight, _) in FAULTS.items() if isinstance(server, Valkey) or "scripts" not in name
    }
    async with cluster:
        await cluster.begin(RATE, retry=True)
        await cluster.recovery()
        before, peak = max(cluster.rss()), 0.0
        ends = time.monotonic() + DURATION_S
        while time.monotonic() < ends:
            await asyncio.sleep(random.uniform(0, 3))
            (name,) = random.choices(list(chosen), list(chosen.values()))
            happened.append(name)
            resets_before = cluster.resets()
            try:
                await FAULTS[name][1](cluster)
                seconds.append(await cluster.recovery())
            except AssertionError as exc:
                raise AssertionError(f"after {happened}: {exc}") from exc
            resets[name] += cluster.resets() - resets_before
            peak = max(peak, *cluster.rss())
        await cluster.finish()
    verdict = cluster.verdict()
    print(
        f"{server.name}: {DURATION_S:.0f} s, {len(happened)} faults {dict(Counter(happened))}; "
        f"recovered within {max(seconds):.2f} s; resets {dict(resets)}; "
        f"{CLIENTS} clients in {sum(client.connections for client in cluster.clients)} connections; {verdict}; "
        f"{peak - before:.0f} MB more"
    )
    verdict.assert_good()
    assert not sum(number for name, number in resets.items() if name not in LOSSY), resets
    assert peak - before < LIMIT_MB
    assert "Traceback" not in cluster.logs(), cluster.logs()
