"""What the rooms of a broker are given, looked at once."""

from __future__ import annotations

from typing import Final

from ..errors import shown
from ..log import check_pattern
from .channel import Channel

_LONGEST_KEY: Final = 200
"""Characters of an idempotency key, which becomes a part of a key of Redis."""


def name_of(channel: str | Channel) -> str:
    """The name of a channel, or a pattern of names.

    Raises:
        TypeError: It is neither that nor a `Channel`.
        ValueError: It is no name and no pattern.
    """
    return channel.name if isinstance(channel, Channel) else check_pattern(channel)


def check_number(name: str, value: object, *, optional: bool = False, positive: bool = False) -> None:
    """See that `value` is a number of at least 0.

    Raises:
        TypeError: It is no number.
        ValueError: It is out of range.
    """
    if value is None and optional:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)} is {type(value).__name__}; give a number{', or None' * optional}")
    if not value >= 0 or (positive and value == 0):
        raise ValueError(f"{name}={value!r} is out of range; give {'more than' if positive else 'at least'} 0")


def check_key(key: object) -> str | None:
    """See that `key` may be an idempotency key, or is none.

    Raises:
        ValueError: It may not.
    """
    if key is None:
        return None
    if not isinstance(key, str) or not 0 < len(key) <= _LONGEST_KEY:
        raise ValueError(f"idempotency_key={shown(key)}; give a str of 1 to {_LONGEST_KEY} characters, or None")
    try:
        key.encode()
    except UnicodeEncodeError:  # an engine would refuse it, and what others publish in the same batch
        raise ValueError(f"idempotency_key={shown(key)} has a lone surrogate; give text that UTF-8 can carry") from None
    return key
