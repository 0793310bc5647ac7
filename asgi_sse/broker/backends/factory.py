"""`backend_of`: the back end of a URL, imported where it is asked for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from asgi_sse.errors import raise_missing_extra, short_repr

from .memory import MemoryBackend

if TYPE_CHECKING:
    from asgi_sse.broker.dispatcher import Dispatcher

    from .base import Backend

_REDIS: Final = {"redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel"}
_NATS: Final = {"nats", "tls", "ws", "wss"}
_PREFIX: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def backend_of(url: str, dispatcher: Dispatcher, *, prefix: str, **options: Any) -> Backend:
    """The back end that brings events to `dispatcher`.

    Raises:
        ModuleNotFoundError: Its client is not installed.
        TypeError: `url` is no ``str``.
        ValueError: `url` or `prefix` is none.
    """
    if not isinstance(url, str):
        raise TypeError(f"url={short_repr(url)} is {type(url).__name__}; give a str, as 'redis://localhost:6379/0'")
    if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
        raise ValueError(f"prefix={short_repr(prefix)}; give up to 64 of A-Z a-z 0-9 _ -")
    scheme, separator, _ = url.partition("://")
    if url == "memory://":
        return MemoryBackend(dispatcher)
    if separator and scheme in _REDIS:
        try:
            from .redis import RedisBackend  # noqa: PLC0415 (an extra)
        except ModuleNotFoundError as exc:
            raise_missing_extra(exc, "redis", "the client of redis", "asgi-sse[redis]")
        return RedisBackend(dispatcher, url, prefix=prefix, **options)
    if separator and scheme in _NATS:
        try:
            from .nats import NatsBackend  # noqa: PLC0415 (an extra)
        except ModuleNotFoundError as exc:
            raise_missing_extra(exc, "nats", "the client of nats", "asgi-sse[nats]")
        return NatsBackend(dispatcher, url, prefix=prefix, **options)
    known = "memory://, redis://HOST:PORT/DB or nats://HOST:PORT"
    raise ValueError(
        f"url={short_repr(scheme + separator if separator else url)} is no broker that is known; give {known}"
    )
