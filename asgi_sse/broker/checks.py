"""What the rooms of a broker are given, looked at once."""

from __future__ import annotations

from typing import Final, cast

from asgi_sse.errors import short_repr

from .channel import Channel
from .patterns import check_pattern

_LONGEST_KEY: Final = 200
"""Characters of an idempotency key, which becomes a part of a key of Redis."""


def name_of(channel: object) -> str:
    """The name of a channel, or a pattern of names.

    Raises:
        TypeError: It is neither that nor a `Channel`.
        ValueError: It is no name and no pattern.
    """
    if isinstance(channel, list | tuple | set | frozenset):
        raise TypeError(f"channel {short_repr(channel)} is {type(channel).__name__}; give each by itself: 'a', 'b'")
    return channel.name if isinstance(channel, Channel) else check_pattern(cast("str", channel))


def check_key(key: object) -> str | None:
    """See that `key` may be an idempotency key, or is none.

    Raises:
        ValueError: It may not.
    """
    if key is None:
        return None
    if not isinstance(key, str) or not 0 < len(key) <= _LONGEST_KEY:
        raise ValueError(f"idempotency_key={short_repr(key)}; give a str of 1 to {_LONGEST_KEY} characters, or None")
    try:
        key.encode()
    except UnicodeEncodeError:  # an engine would refuse it, and what others publish in the same batch
        raise ValueError(
            f"idempotency_key={short_repr(key)} has a lone surrogate; give text that UTF-8 can carry"
        ) from None
    return key
