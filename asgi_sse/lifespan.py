"""The lifespan protocol: answered for an app that has none."""

from collections.abc import Awaitable, Callable
from typing import Any

from ._types import Receive, Send


async def answer(
    receive: Receive,
    send: Send,
    *,
    startup: Callable[[], Any],
    shutdown: Callable[[], Awaitable[Any]],
) -> None:
    """Answer start-up and shutdown, calling `startup` and awaiting `shutdown` in between."""
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            startup()
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await shutdown()
            await send({"type": "lifespan.shutdown.complete"})
            return
