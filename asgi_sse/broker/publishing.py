"""`publish`: to the channels of an app, from where no event loop runs."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from asgi_sse.errors import BrokerError
from asgi_sse.protocol.validation import check_number

from .backends.base import Publication
from .backends.factory import backend_of
from .backends.remote import RemoteBackend
from .checks import check_key
from .dispatcher import Dispatcher, unnumbered
from .log import EventLog
from .patterns import check_name

_AS_OTHERS: Final = {"burst": 1, "history": None, "max_channels": 10_000, "max_age": None}
"""The limits of a channel are those of the brokers that have it open."""


def publish(
    url: str,
    channel: str,
    event: Any,
    *,
    idempotency_key: str | None = None,
    prefix: str = "asgi_sse",
    timeout: float | None = 5.0,
) -> str:
    """Publish an event to the subscribers of an app, and give its id: for Celery's tasks, cron jobs, WSGI, scripts.

    It connects, publishes, and lets go of the connection: some milliseconds. Who publishes much keeps a `Broker` open.

    Args:
        url: As of `Broker`, but for ``memory://``.
        channel: The channel's name.
        event: As of `Broker.publish`.
        idempotency_key: As of `Broker.publish`.
        prefix: As of `Broker`.
        timeout: Seconds to wait until it is acknowledged; ``None``: as long as it takes.

    Raises:
        BrokerError: It was not acknowledged in that time, or refused; or there is an event loop in this thread, which
            it would block.
        InvalidEventError: As of `Broker.publish`.
        ModuleNotFoundError: The engine's client is not installed.
        ValueError: The URL, the channel's name or another argument is none.
    """
    check_number("timeout", timeout, optional=True, positive=True)
    publication = Publication(check_name(channel), unnumbered(event), check_key(idempotency_key))
    backend = backend_of(url, Dispatcher(EventLog()), prefix=prefix, timeout=timeout, **_AS_OTHERS)
    if not isinstance(backend, RemoteBackend):
        raise ValueError(  # noqa: TRY004 (of another value)
            f"url={url!r}: what is in the memory of an app is published to in its own process"
        )
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_publish(backend, publication, timeout))
    raise BrokerError("publish() would block the event loop of this thread: await the publish() of a Broker")


async def _publish(backend: RemoteBackend, publication: Publication, timeout: float | None) -> str:
    try:
        async with asyncio.timeout(timeout):
            await backend.open(follow=False)
    except TimeoutError:
        raise BrokerError(f"not published: {backend.url} did not answer within {timeout:g} s") from None
    try:
        return await backend.publish(publication)
    finally:
        await backend.close()
