"""`RedisURL`: create clients of redis-py for a URL of a server, a cluster or sentinels."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import redis.asyncio
import redis.asyncio.sentinel
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

_SOCKET_TIMEOUT_S: Final = 5.0
"""Seconds without an answer after which a connection is closed. A read of the log blocks for less."""


def redact_url(url: str) -> str:
    """Return a URL without its password and without its query, which may hold another password."""
    url = url.partition("?")[0]
    head, at, tail = url.rpartition("@")
    if not at:
        return url
    scheme, separator, user = head.partition("://")
    return f"{scheme}{separator}{user.partition(':')[0]}:***@{tail}"


class RedisURL:
    """The options of a client, read from a URL.

    Args:
        url: See `RedisBackend`.

    Raises:
        ValueError: The URL is invalid.
    """

    def __init__(self, url: str) -> None:
        scheme, _, self._kind = url.partition("://")[0].partition("+")
        self._url = url.replace(f"+{self._kind}://", "://", 1) if self._kind else url
        self._options: dict[str, Any] = {
            "socket_timeout": _SOCKET_TIMEOUT_S,
            "socket_connect_timeout": _SOCKET_TIMEOUT_S,
            # The backend retries by itself, since it knows what may have been published.
            "retry": Retry(NoBackoff(), 0),
        }
        if scheme != "unix":
            self._options["socket_keepalive"] = True
        if self._kind == "sentinel":
            self._parse_sentinels(tls=scheme == "rediss")
        else:
            self._validate()

    def _validate(self) -> None:
        try:
            parse_url(self._url)
        except ValueError:  # its text may quote a part of the password
            raise ValueError(
                f"url must be one that redis-py accepts, got {redact_url(self._url)!r}; pass one like "
                "redis://USER:PASSWORD@HOST:PORT/0, and write / # ? @ in a password as %2F %23 %3F %40"
            ) from None

    def connect(self) -> tuple[Any, list[Any]]:
        """Return a client, and all clients that have to be closed with it. Connections are opened when used."""
        if self._kind == "cluster":
            client: Any = redis.asyncio.RedisCluster.from_url(self._url, **self._options)
            return client, [client]
        if self._kind == "sentinel":
            sentinel: Any = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]
                self._sentinels, sentinel_kwargs=self._sentinel_options, **self._options
            )
            client = sentinel.master_for(self._service)
            return client, [client, *sentinel.sentinels]
        client = redis.asyncio.Redis.from_url(self._url, **self._options)
        return client, [client]

    def _parse_sentinels(self, *, tls: bool) -> None:
        parts = urlsplit(self._url)
        login, _, addresses = parts.netloc.rpartition("@")
        self._service, _, database = parts.path.strip("/").partition("/")
        if not self._service or not addresses:
            raise ValueError(
                f"url must name the sentinels and the service, got {redact_url(self._url)!r}; pass one like "
                "redis+sentinel://HOST:26379,HOST:26379/mymaster/0"
            )
        user, _, password = login.partition(":")
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self._sentinel_options = {
            "socket_timeout": _SOCKET_TIMEOUT_S,
            "socket_connect_timeout": _SOCKET_TIMEOUT_S,
            **{name.removeprefix("sentinel_"): query.pop(name) for name in list(query) if name.startswith("sentinel_")},
        }
        self._sentinels = []
        for address in addresses.split(","):
            parsed = urlsplit(f"//{address}")
            self._sentinels.append((parsed.hostname or "localhost", parsed.port or 26379))
        self._options |= {**query, "db": int(database or 0), "ssl": tls}
        if user:
            self._options["username"] = unquote(user)
        if password:
            self._options["password"] = unquote(password)
