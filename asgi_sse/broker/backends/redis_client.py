"""A client of redis-py for a URL."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import redis.asyncio
import redis.asyncio.sentinel
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

_SOCKET_TIMEOUT: Final = 5.0
"""Seconds without an answer after which a connection is given up; more than a read waits."""


def shown_url(url: str) -> str:
    """A URL without its passwords, which may be in its query as well."""
    url = url.partition("?")[0]
    head, at, tail = url.rpartition("@")
    if not at:
        return url
    scheme, separator, user = head.partition("://")
    return f"{scheme}{separator}{user.partition(':')[0]}:***@{tail}"


class RedisURL:
    """What a URL says.

    Args:
        url: See `redis.RedisBackend`.

    Raises:
        ValueError: It is none.
    """

    def __init__(self, url: str) -> None:
        scheme, _, self._kind = url.partition("://")[0].partition("+")
        self._url = url.replace(f"+{self._kind}://", "://", 1) if self._kind else url
        self._options: dict[str, Any] = {
            "socket_timeout": _SOCKET_TIMEOUT,
            "socket_connect_timeout": _SOCKET_TIMEOUT,
            "retry": Retry(NoBackoff(), 0),  # we have our own, which knows what was published
        }
        if scheme != "unix":
            self._options["socket_keepalive"] = True
        if self._kind == "sentinel":
            self._parse_sentinels(tls=scheme == "rediss")
        else:
            self._check()

    def _check(self) -> None:
        try:
            parse_url(self._url)
        except ValueError:  # which may quote a part of the password
            raise ValueError(
                f"url={shown_url(self._url)!r} is none that redis-py takes; give redis://USER:PASSWORD@HOST:PORT/0, "
                "with / # ? @ of a password as %2F %23 %3F %40"
            ) from None

    def connect(self) -> tuple[Any, list[Any]]:
        """A client, and all that is to be closed behind it."""
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
        login, _, places = parts.netloc.rpartition("@")
        self._service, _, database = parts.path.strip("/").partition("/")
        if not self._service or not places:
            raise ValueError(
                f"{shown_url(self._url)}: give the sentinels and the name of the service, as "
                "redis+sentinel://HOST:26379,HOST:26379/mymaster/0"
            )
        user, _, password = login.partition(":")
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self._sentinel_options = {
            "socket_timeout": _SOCKET_TIMEOUT,
            "socket_connect_timeout": _SOCKET_TIMEOUT,
            **{name.removeprefix("sentinel_"): query.pop(name) for name in list(query) if name.startswith("sentinel_")},
        }
        self._sentinels = []
        for place in places.split(","):
            found = urlsplit(f"//{place}")
            self._sentinels.append((found.hostname or "localhost", found.port or 26379))
        self._options |= {**query, "db": int(database or 0), "ssl": tls}
        if user:
            self._options["username"] = unquote(user)
        if password:
            self._options["password"] = unquote(password)
