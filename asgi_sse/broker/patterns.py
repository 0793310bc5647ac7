"""The names of channels, and patterns that match several names."""

import re
from collections.abc import Callable
from typing import Final

from asgi_sse.errors import short_repr

MAX_NAME: Final = 200
"""Characters of a channel's name, which becomes a key of Redis and a subject of NATS."""

# Segments between dots, of letters, digits and marks that neither Redis nor NATS uses in wildcards.
_NAME: Final = re.compile(r"[A-Za-z0-9_~:/@+=,-]+(?:\.[A-Za-z0-9_~:/@+=,-]+)*")
_FORBIDDEN: Final = re.compile(r"[^A-Za-z0-9_~:/@+=,.-]")
_PATTERN: Final = re.compile(r"(?:[A-Za-z0-9_~:/@+=,-]+|\*)(?:\.(?:[A-Za-z0-9_~:/@+=,-]+|\*))*(?:\.\*\*)?|\*\*")


def check_name(name: str) -> str:
    """Return `name` if it is valid for a channel.

    Raises:
        TypeError: `name` is not a ``str``.
        ValueError: `name` has other characters, or is too long.
    """
    if not isinstance(name, str):
        raise TypeError(f"channel must be a str, got {short_repr(name)} ({type(name).__name__})")
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        cure = ""
        if forbidden := _FORBIDDEN.search(name):
            cure = "; only patterns may have '*'" if forbidden[0] == "*" else f"; remove {forbidden[0]!r}"
        raise ValueError(
            f"channel must be 1 to {MAX_NAME} of A-Z a-z 0-9 _ ~ : / @ + = , - in segments between dots, "
            f"got {short_repr(name)}{cure}"
        )
    return name


def is_pattern(name: str) -> bool:
    """Return whether a valid name or pattern is a pattern."""
    return "*" in name


def check_pattern(name: str) -> str:
    """Return `name` if it is a valid channel name, or a valid pattern of names.

    In a pattern, ``*`` stands for one segment, and ``**`` at the end for one or more.

    Raises:
        TypeError: `name` is not a ``str``.
        ValueError: `name` is neither.
    """
    if not isinstance(name, str) or not is_pattern(name):
        return check_name(name)
    if len(name) > MAX_NAME or not _PATTERN.fullmatch(name):
        raise ValueError(
            f"pattern must have up to {MAX_NAME} characters, with '*' for one whole segment as in 'orders.*', or '**' "
            f"for all segments that follow as in 'orders.**', got {short_repr(name)}"
        )
    return name


def pattern_test(pattern: str) -> Callable[[str], bool]:
    """Return a function that tells whether a channel name matches `pattern`."""
    if pattern == "**":
        return lambda _: True
    parts = [re.escape(part) if part != "*" else r"[^.]+" for part in pattern.removesuffix(".**").split(".")]
    text = r"\.".join(parts) + (r"\..+" if pattern.endswith(".**") else "")
    matches = re.compile(text).fullmatch
    return lambda name: matches(name) is not None
