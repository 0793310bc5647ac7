"""`backend_of`: create the backend of a URL. The client of a server is imported only if its scheme is used."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from asgi_sse.errors import raise_missing_extra, short_repr

from .memory import MemoryBackend

if TYPE_CHECKING:
    from asgi_sse.broker.dispatcher import Dispatcher

    from .base import Backend

_REDIS_SCHEMES: Final = {
    "redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel",
}  # fmt: skip
_NATS_SCHEMES: Final = {"nats", "tls", "ws", "wss"}
_PREFIX: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def backend_of(url: str, dispatcher: Dispatcher, *, prefix: str, **options: Any) -> Backend:
    """Create the backend of a URL.

    Args:
        url: ``memory://``, or the URL of a Redis or NATS server.
        dispatcher: Receives the events.
        prefix: Prefix of the server's keys or subjects: 1 to 64 characters of A-Z a-z 0-9 _ -.
        options: Further arguments of `RedisBackend` and `NatsBackend`.

    Raises:
        ModuleNotFoundError: The client of the server is not installed.
        TypeError: `url` is not a string.
        ValueError: `url` or `prefix` is invalid.
    """
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, got {type(url).__name__}; pass one like 'redis://localhost:6379/0'")
    if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
        raise ValueError(
            f"prefix must be 1 to 64 characters of A-Z a-z 0-9 _ -, got {short_repr(prefix)}; pass one like 'asgi_sse'"
        )
    scheme, separator, rest = url.partition("://")
    if url == "memory://":
        return MemoryBackend(dispatcher)
    if separator and scheme in _REDIS_SCHEMES:
        try:
            from .redis import RedisBackend  # noqa: PLC0415 (an extra)
        except ModuleNotFoundError as exc:
            raise_missing_extra(exc, "redis", "the client of redis", "asgi-sse[redis]")
        return RedisBackend(dispatcher, url, prefix=prefix, **options)
    if separator and scheme in _NATS_SCHEMES:
        try:
            from .nats import NatsBackend  # noqa: PLC0415 (an extra)
        except ModuleNotFoundError as exc:
            raise_missing_extra(exc, "nats", "the client of nats", "asgi-sse[nats]")
        return NatsBackend(dispatcher, url, prefix=prefix, **options)
    # A password may stand before an @, or in a query.
    shown = "..." if "@" in scheme or "?" in scheme else scheme
    if separator:
        shown = f"{shown}://{'...' if rest else ''}"
    raise ValueError(
        f"url must be memory://, or start with redis://, rediss://, unix:// or nats://, got {short_repr(shown)}; "
        "pass one like redis://HOST:PORT/DB or nats://HOST:PORT"
    )
