"""What may be published; and `publish`, for code outside of an event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from asgi_sse.errors import BrokerError, InvalidEventError, short_repr
from asgi_sse.protocol.event import as_event
from asgi_sse.protocol.validation import check_number

from .backends.base import Publication
from .backends.factory import backend_of
from .backends.remote import RemoteBackend
from .dispatcher import Dispatcher
from .log import EventLog
from .patterns import check_name

if TYPE_CHECKING:
    from asgi_sse.protocol.event import ServerSentEvent

_MAX_KEY: Final = 200
"""Characters of an idempotency key, which becomes a part of a key of Redis."""

_NO_LIMITS: Final = {"burst": 1, "history": None, "max_channels": 10_000, "max_age": None}
"""Options of the backend of `publish`. The brokers that are open on the same server set the limits of a channel."""


def event_to_publish(item: Any) -> ServerSentEvent:
    """Return the event for an item that was passed to ``publish`` or yielded by the source of a run.

    Raises:
        InvalidEventError: The item is not an event, or has an id.
    """
    event = as_event(item)
    if event.id is not None:
        raise InvalidEventError(
            f"an event to publish must have no id, got id={short_repr(event.id)}; leave the id out, the broker adds one"
        )
    return event


def check_idempotency_key(key: object) -> str | None:
    """Return `key` if it is a valid idempotency key, or ``None``.

    Raises:
        ValueError: `key` is neither.
    """
    if key is None:
        return None
    if not isinstance(key, str) or not 0 < len(key) <= _MAX_KEY:
        raise ValueError(f"idempotency_key must be a str of 1 to {_MAX_KEY} characters or None, got {short_repr(key)}")
    try:
        key.encode()
    except UnicodeEncodeError:  # a server would refuse the key, and all other publications of its batch
        raise ValueError(
            f"idempotency_key must be text that UTF-8 can encode, got {short_repr(key)}; remove the lone surrogate"
        ) from None
    return key


def publish(
    url: str,
    channel: str,
    event: Any,
    *,
    idempotency_key: str | None = None,
    prefix: str = "asgi_sse",
    timeout: float | None = 5.0,
) -> str:
    """Publish an event to the subscribers of an app and return its id, from code without an event loop.

    Use it in Celery tasks, cron jobs, WSGI apps and scripts. Each call connects, publishes and disconnects, which takes
    some milliseconds. Code that publishes often should keep a `Broker` open instead.

    Args:
        url: The URL of the broker, as for `Broker`. ``memory://`` is not possible.
        channel: The name of the channel.
        event: A `ServerSentEvent` without an id, a ``dict`` of its arguments, or ``str``, ``int`` or ``float``.
        idempotency_key: Publishing the same key to the same channel again within two minutes adds no event, and
            returns the id of the first one. 1 to 200 characters; ``None`` for no key.
        prefix: The prefix of the broker, as for `Broker`.
        timeout: Seconds to wait for the acknowledgement; ``None`` for no limit.

    Returns:
        The id of the event.

    Raises:
        BrokerError: The event was refused, or was not acknowledged in time; the message says whether it may have been
            published. Or an event loop runs in this thread, which the call would block.
        InvalidEventError: The event cannot be sent, or has an id.
        ModuleNotFoundError: The client library of the backend is not installed.
        ValueError: The URL, the channel's name or another argument is invalid.
    """
    check_number("timeout", timeout, optional=True, positive=True)
    publication = Publication(check_name(channel), event_to_publish(event), check_idempotency_key(idempotency_key))
    backend = backend_of(url, Dispatcher(EventLog()), prefix=prefix, timeout=timeout, **_NO_LIMITS)
    if not isinstance(backend, RemoteBackend):
        raise ValueError(  # noqa: TRY004 (the type of `url` is right)
            f"url must be that of a server, got {url!r}; publish to memory by a Broker of the app in its own process"
        )
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_publish(backend, publication, timeout))
    raise BrokerError("publish() would block the event loop of this thread; await the publish() of a Broker instead")


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
