"""Fixtures for the tests of the backends on a server."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import pytest
from backend_servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator

_prefixes = (f"r{number}" for number in count())


@pytest.fixture
def anyio_backend() -> str:
    """The clients of the servers need asyncio. Memory on trio has tests of its own."""
    return "asyncio"


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A Valkey server that the tests of a module share, each with a prefix of its own."""
    with Valkey(tmp_path_factory.mktemp("valkey"), sync=False) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test uses."""
    return next(_prefixes)


@pytest.fixture
def short_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle readers on Redis check the log ten times a second instead of once, to save time."""
    from asgi_sse.broker.backends import redis

    monkeypatch.setattr(redis, "_BLOCK_MS", 100)


@pytest.fixture
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes renew and check leases often. Leases are not shortened, so that they survive a busy machine."""
    from asgi_sse.broker.runs import manager

    monkeypatch.setattr(manager, "_WATCH_INTERVAL_S", 0.05)
