"""The response headers of an event stream, checked and encoded as ASGI takes them."""

import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias, cast

from asgi_sse.errors import short_repr

Headers: TypeAlias = Mapping[str, str] | Iterable[tuple[str, str]]
"""Headers as an app gives them: a mapping, or pairs of name and value."""

# no-transform asks proxies not to compress. X-Accel-Buffering turns off the buffering of nginx. There is no Connection
# header, because HTTP/2 forbids it.
EVENT_STREAM_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
)
"""The headers that each event stream sends, unless the app replaces one of them."""

_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2


def event_stream_headers(headers: Headers | None) -> tuple[tuple[bytes, bytes], ...]:
    """Return `EVENT_STREAM_HEADERS` with `headers` added, each in place of the default of its name.

    Raises:
        TypeError: `headers` is not a mapping or pairs of two ``str``.
        ValueError: A header cannot be sent, frames the body, or sets another content type.
    """
    if not headers:
        return EVENT_STREAM_HEADERS
    given = tuple(encode_header(name, value) for name, value in _pairs(headers))
    for name, value in given:
        if name in (b"content-length", b"transfer-encoding"):
            raise ValueError(
                f"headers: {name.decode()!r} must be left to the server, which frames the stream; remove it"
            )
        if name == b"content-type" and not value.lower().startswith(b"text/event-stream"):
            raise ValueError(
                f"headers: content-type must be text/event-stream, the only type that clients read, "
                f"got {short_repr(value.decode('latin-1'))}; remove it"
            )
    names = {name for name, _ in given}
    return tuple(pair for pair in EVENT_STREAM_HEADERS if pair[0] not in names) + given


def encode_header(name: str, value: str) -> tuple[bytes, bytes]:
    """Return a header as ASGI takes it: its lower-case name and its value, both bytes.

    Raises:
        TypeError: The name or the value is not a ``str``.
        ValueError: The header cannot be sent, or would inject another one.
    """
    if not isinstance(name, str) or not isinstance(value, str):
        raise TypeError(f"headers: name and value must be two str, got {short_repr(name)}: {short_repr(value)}")
    try:
        encoded = name.lower().encode("ascii"), value.strip(" \t").encode("latin-1")
    except UnicodeEncodeError as exc:
        raise ValueError(
            f"headers: a name must be ASCII and a value Latin-1, got {short_repr(name)}: {short_repr(value)}; "
            "percent-encode other characters"
        ) from exc
    if not _TOKEN.fullmatch(encoded[0]):
        raise ValueError(
            f"headers: a name must be an HTTP token, got {short_repr(name)}; use letters, digits and hyphens"
        )
    if any(char in value for char in "\r\n\0"):
        raise ValueError(
            f"headers: a value must have no CR, LF or NUL, which would inject headers, "
            f"got {short_repr(name)}: {short_repr(value)}; remove it"
        )
    return encoded


def _pairs(headers: Headers) -> Iterable[tuple[str, str]]:
    if isinstance(headers, Mapping):
        return cast("Mapping[str, str]", headers).items()
    pairs = list(headers) if isinstance(headers, Iterable) else [headers]
    # A str of two characters unpacks into a pair too, so look at the type.
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"headers must be a mapping or pairs (name, value), got {short_repr(headers)}")
    return pairs
