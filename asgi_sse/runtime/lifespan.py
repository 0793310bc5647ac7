"""The lifespan protocol around any app: forwarded to the app, or answered for an app without lifespan support."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from asgi_sse.protocol.asgi import ASGIApp, Message, Receive, Scope, Send

logger: Final = logging.getLogger(__name__)


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
    """Forward the lifespan to `app`, and run our own start-up and shutdown before the app's.

    An app without lifespan support raises before it receives the first message, as Django does, or returns
    without an answer. Unless `strict` is set, this function then answers the server for the app. Otherwise
    such an app would keep our streams from learning about the shutdown.

    Args:
        app: The app.
        scope: The lifespan's scope.
        receive: The server's ``receive``.
        send: The server's ``send``.
        startup: Called before the app's start-up.
        shutdown: Called before the app's shutdown.
        strict: Leave every answer to the app.

    Raises:
        Exception: What `app` raised after its start-up began, so that a failed start-up stays fatal. If
            `strict` is set, anything that `app` raised.
    """
    pending = ""  # the type of the message that the app has received and not answered yet
    begun = answered = False  # answered: the server has had its last answer

    async def receive_after_ours() -> Message:
        nonlocal pending, begun
        message = await receive()
        pending = message["type"]
        if pending == "lifespan.startup":
            begun = True
            try:
                await startup()
            except Exception as exc:
                # Answer before raising. From an exception alone, uvicorn concludes that the app has no lifespan
                # support, and it serves without a lifespan.
                await forward({"type": "lifespan.startup.failed", "message": f"{type(exc).__name__}: {exc}"})
                raise
        elif pending == "lifespan.shutdown":
            await shutdown()
        return message

    async def forward(message: Message) -> None:
        nonlocal pending, answered
        if answered:
            return  # the app repeats an answer that we have given for it
        pending = ""
        answered = message["type"] in (
            "lifespan.startup.failed",
            "lifespan.shutdown.complete",
            "lifespan.shutdown.failed",
        )
        await send(message)

    try:
        await app(scope, receive_after_ours, forward)
    except Exception:
        if strict or begun:
            raise
        logger.debug("the app has no lifespan support; the middleware answers for it", exc_info=True)
    while not (strict or answered):
        kind = pending or (await receive_after_ours())["type"]
        await forward({"type": f"{kind}.complete"})
