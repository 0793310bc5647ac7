"""What the rooms of a broker are given, looked at once."""

from __future__ import annotations

from ..errors import shown
from ..log import check_pattern
from .channel import Channel


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
