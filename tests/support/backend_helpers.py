"""Helpers for the tests of the backends: read subscriptions, wait for a state, sources of runs."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from backend_servers import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asgi_sse import ServerSentEvent, Subscription
    from asgi_sse.broker.backends.base import RunLease


async def take(subscription: Subscription, number: int) -> list[ServerSentEvent]:
    """Return the next events of a subscription."""
    async with asyncio.timeout(TIMEOUT_S):
        return [await anext(subscription) for _ in range(number)]


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


def data(events: list[ServerSentEvent]) -> list[str | None]:
    return [event.data for event in events]


def reset_reason(event: ServerSentEvent) -> str:
    """Return the reason of a reset; fail if the event is another one."""
    assert event.event == "reset"
    return str(json.loads(event.data or "")["reason"])


async def endless() -> AsyncIterator[str]:
    """A source of one event that never ends."""
    yield "first"
    await asyncio.Event().wait()


async def two_parts(release: asyncio.Event) -> AsyncIterator[str]:
    """A source that yields "before", waits for `release`, and yields "after"."""
    yield "before"
    await release.wait()
    yield "after"


async def renewed_already(_name: str, _lease: RunLease) -> bool:
    """Stand in for `Backend.renew_lease`: report success without writing to the server."""
    return True
