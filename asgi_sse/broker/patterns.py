"""The names of channels, and patterns that match several."""

import re
from collections.abc import Callable
from typing import Final

from asgi_sse.errors import short_repr

MAX_NAME: Final = 200
"""Characters of a channel's name; it becomes a key of Redis and a subject of NATS."""

# Letters, digits and marks that are none of a wildcard's, in segments between dots.
_NAME: Final = re.compile(r"[A-Za-z0-9_~:/@+=,-]+(?:\.[A-Za-z0-9_~:/@+=,-]+)*")
_OTHER: Final = re.compile(r"[^A-Za-z0-9_~:/@+=,.-]")
_PATTERN: Final = re.compile(r"(?:[A-Za-z0-9_~:/@+=,-]+|\*)(?:\.(?:[A-Za-z0-9_~:/@+=,-]+|\*))*(?:\.\*\*)?|\*\*")


def check_name(name: str) -> str:
    """`name` itself, if a channel may be called so.

    Raises:
        TypeError: It is no ``str``.
        ValueError: It has other characters, or is too long.
    """
    if not isinstance(name, str):
        raise TypeError(f"channel {short_repr(name)} is {type(name).__name__}; give a str")
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        wrong = ""
        if other := _OTHER.search(name):
            wrong = f"; {other[0]!r} is {'for patterns' if other[0] == '*' else 'not among them'}"
        raise ValueError(
            f"channel {short_repr(name)}: give up to {MAX_NAME} of A-Z a-z 0-9 _ ~ : / @ + = , - in segments between dots"
            + wrong
        )
    return name


def is_pattern(name: str) -> bool:
    """Whether `name` stands for many channels."""
    return "*" in name


def check_pattern(name: str) -> str:
    """`name` itself, if it is a channel's name, or a pattern of names: ``*`` is one segment, ``**`` the rest.

    Raises:
        TypeError: It is no ``str``.
        ValueError: It is neither.
    """
    if not isinstance(name, str) or not is_pattern(name):
        return check_name(name)
    if len(name) > MAX_NAME or not _PATTERN.fullmatch(name):
        raise ValueError(
            f"pattern {short_repr(name)}: '*' stands for one whole segment, as in 'orders.*', and '**' at the end for all "
            "that follow, as in 'orders.**'"
        )
    return name


def pattern_test(pattern: str) -> Callable[[str], bool]:
    """A function that tells whether a channel's name matches `pattern`."""
    if pattern == "**":
        return lambda _: True
    parts = [re.escape(part) if part != "*" else r"[^.]+" for part in pattern.removesuffix(".**").split(".")]
    text = r"\.".join(parts) + (r"\..+" if pattern.endswith(".**") else "")
    matches = re.compile(text).fullmatch
    return lambda name: matches(name) is not None
