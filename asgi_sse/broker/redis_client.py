"""A client of redis-py for a URL."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import redis.asyncio
import redis.asyncio.sentinel
from redis.backoff import NoBackoff

_SOCKET_TIMEOUT: Final = 5.0
"""Seconds without an answer after which a connection is given up; more than a read waits."""


def shown_url(url: str) -> str:
    """A URL without its password."""
    head, at, tail = url.rpartition("@")
    if not at:
        return url
    scheme, separator, user = head.partition("://")
    return f"{scheme}{separator}{user.partition(':')[0]}:***@{tail}"


def client_of(url: str) -> tuple[Any, list[Any]]:
    """A client for a URL, and all that is to be closed behind it."""
    options: dict[str, Any] = {
        "socket_timeout": _SOCKET_TIMEOUT,
        "socket_connect_timeout": _SOCKET_TIMEOUT,
        "socket_keepalive": True,
        "retry": redis.asyncio.retry.Retry(NoBackoff(), 0),  # we have our own, which knows what was published
    }
    scheme, _, kind = url.partition("://")[0].partition("+")
    plain = url.replace(f"+{kind}://", "://", 1) if kind else url
    if kind == "cluster":
        client: Any = redis.asyncio.RedisCluster.from_url(plain, **options)
        return client, [client]
    if kind == "sentinel":
        return _by_sentinel(plain, options, tls=scheme == "rediss")
    client = redis.asyncio.Redis.from_url(plain, **options)
    return client, [client]


def _by_sentinel(url: str, options: dict[str, Any], *, tls: bool) -> tuple[Any, list[Any]]:
    parts = urlsplit(url)
    login, _, places = parts.netloc.rpartition("@")
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError(f"{shown_url(url)}: give the name of the service, as redis+sentinel://HOST:26379/mymaster/0")
    user, _, password = login.partition(":")
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    sentinel_options = {
        name.removeprefix("sentinel_"): query.pop(name) for name in list(query) if name.startswith("sentinel_")
    }
    hosts = []
    for place in places.split(","):
        host, _, port = place.rpartition(":") if ":" in place.rpartition("]")[2] else (place, "", "26379")
        hosts.append((host.strip("[]"), int(port)))
    options = {**options, **query, "db": int(database or 0), "ssl": tls}
    if user:
        options["username"] = unquote(user)
    if password:
        options["password"] = unquote(password)
    timeouts = {name: options[name] for name in ("socket_timeout", "socket_connect_timeout")}
    sentinel: Any = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]
        hosts, sentinel_kwargs={**timeouts, **sentinel_options}, **options
    )
    client = sentinel.master_for(service)
    return client, [client, *sentinel.sentinels]
