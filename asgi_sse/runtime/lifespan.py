"""The lifespan protocol around any app: passed on to it, or answered for an app that has none."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from asgi_sse.protocol.asgi import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)


async def chain(
    app: ASGIApp,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    startup: Callable[[], Awaitable[Any]],
    shutdown: Callable[[], Awaitable[Any]],
    strict: bool,
) -> None:
    """Pass the lifespan on to `app`, with `startup` before its start and `shutdown` before its end.

    An app that has no lifespan raises before it asks for the first message, as Django does, or returns
    without an answer. Unless `strict`, it is answered in its place: an app around which we are shall not
    decide whether our streams learn of the shutdown.

    Raises:
        Exception: What `app` raised, once it had begun its start-up, so that one that fails stays fatal; if
            `strict`, always.
    """
    pending = ""  # the type of the message that the app has taken and not answered yet
    begun = over = False

    async def receive_after_ours() -> Message:
        nonlocal pending, begun
        message = await receive()
        pending = message["type"]
        if pending == "lifespan.startup":
            begun = True
            try:
                await startup()
            except Exception as exc:
                # Told here: of an exception alone, uvicorn takes it that there is no lifespan, and goes on without.
                await send_on({"type": "lifespan.startup.failed", "message": f"{type(exc).__name__}: {exc}"})
                raise
        elif pending == "lifespan.shutdown":
            await shutdown()
        return message

    async def send_on(message: Message) -> None:
        nonlocal pending, over
        if over:
            return  # the app tells as well what we have told
        pending = ""
        over = message["type"] in ("lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed")
        await send(message)

    try:
        await app(scope, receive_after_ours, send_on)
    except Exception:
        if strict or begun:
            raise
        logger.debug("the app has no lifespan, and is answered in its place", exc_info=True)
    while not (strict or over):
        kind = pending or (await receive_after_ours())["type"]
        await send_on({"type": f"{kind}.complete"})
