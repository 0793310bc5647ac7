"""What tests of runs share: a source of words, an app that streams runs, and what its clients get."""

from collections.abc import AsyncIterator
from typing import Any

import anyio

from asgi_sse import Broker, create_app
from asgi_sse.testing import OpenStream


async def words(count: int = 5, pause: float = 1.0) -> AsyncIterator[str]:
    """Yield ``word 0``, ``word 1`` and so on, with a pause in seconds after each."""
    for number in range(count):
        yield f"word {number}"
        await anyio.sleep(pause)


def words_and_end(count: int, reason: str = "finished") -> list[str]:
    """Return the data of all events of a run of `words`, the final event included."""
    return [*(f"word {number}" for number in range(count)), f'{{"reason":"{reason}"}}']


async def data_of(stream: OpenStream) -> list[str]:
    """Return the data of all events until the stream ends, which it must do completely."""
    events = [event async for event in stream]
    assert stream.complete
    return [str(event.data) for event in events]


def app_of(broker: Broker, **options: Any) -> Any:
    """Return an app with the runs of `broker` at ``/runs/NAME``, and its channel ``chat`` at ``/chat``."""
    return create_app({"/runs/{channel}": broker.endpoint(runs=True), "/chat": broker.channel("chat")}, **options)
