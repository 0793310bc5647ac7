"""The events of the drop-in for sse-starlette: its constructor, its bytes, and `ensure_bytes`."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, Final

from asgi_sse.errors import InvalidEventError, short_repr
from asgi_sse.protocol import event as core

__all__ = ["JSONServerSentEvent", "ServerSentEvent", "ensure_bytes"]

# The only line ends of an event stream (WHATWG HTML 9.2.5). str.splitlines() also splits at others, such as U+2028.
_LINE_END: Final = re.compile(r"\r\n|\r|\n")


class ServerSentEvent:
    r"""An event with the constructor and the bytes of sse-starlette's.

    It differs from `asgi_sse.ServerSentEvent` in three ways: data of any type is sent as ``str(data)``, the line end is
    CRLF, and the fields can be changed until the event is encoded.

    Args:
        data: The data, sent as ``str(data)``. Default: ``None``, no data.
        event: The event type. Default: ``None``, which clients read as ``message``.
        id: The value that the client sends back as ``Last-Event-ID``. Default: ``None``, no id.
        retry: The reconnection time in milliseconds. Default: ``None``, unchanged.
        comment: Text that clients ignore. Default: ``None``, no comment.
        sep: The line end: ``"\r\n"``, ``"\r"`` or ``"\n"``. Default: ``DEFAULT_SEPARATOR``.

    Attributes:
        DEFAULT_SEPARATOR: The line end without `sep`: CRLF.

    Raises:
        ValueError: `sep` is not a line end of an event stream.
    """

    DEFAULT_SEPARATOR: ClassVar[str] = "\r\n"

    def __init__(
        self,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,  # noqa: A002 (the field's name)
        retry: int | None = None,
        comment: str | None = None,
        sep: str | None = None,
    ) -> None:
        self.data = data
        self.event = event
        self.id = id
        self.retry = retry
        self.comment = comment
        self._sep = self.DEFAULT_SEPARATOR if sep is None else core.check_separator(sep)

    def encode(self) -> bytes:
        """Return the event as bytes of a stream, including the blank line that ends it.

        Raises:
            InvalidEventError: `id` or `event` contains a line end, which would inject fields; `id` contains a NUL;
                `retry` is negative; or a text cannot be encoded as UTF-8.
            TypeError: `retry` is not an ``int``.
        """
        # Writing the lines here saves an asgi_sse.ServerSentEvent, which would add 25 to 40 % to an event of one line.
        sep = self._sep
        text = ""
        if self.comment is not None:
            text = _lines(": ", self.comment, sep)
        if self.id is not None:
            text += f"id: {core.id_text(self.id)}{sep}"
        if self.event is not None:
            text += f"event: {core.one_line(self.event, 'event')}{sep}"
        if self.data is not None:
            text += _lines("data: ", self.data, sep)
        if self.retry is not None:
            if not isinstance(self.retry, int) or isinstance(self.retry, bool):
                raise TypeError("retry argument must be int")  # sse-starlette's own text, which its tests compare
            text += f"retry: {core.milliseconds(self.retry)}{sep}"
        try:
            return (text + sep).encode()
        except UnicodeEncodeError as exc:
            raise InvalidEventError(
                f"the event's text must be valid Unicode, got {short_repr(text)} ({exc}), which UTF-8 cannot carry; "
                "decode its source with errors='replace'"
            ) from exc

    def __repr__(self) -> str:
        names = ("data", "event", "id", "retry", "comment")
        given = (f"{name}={short_repr(getattr(self, name))}" for name in names if getattr(self, name) is not None)
        return f"{type(self).__name__}({', '.join(given)})"


def _lines(prefix: str, value: object, sep: str) -> str:
    text = str(value)
    if "\n" in text or "\r" in text:
        text = f"{sep}{prefix}".join(_LINE_END.split(text))
    return f"{prefix}{text}{sep}"


class JSONServerSentEvent(ServerSentEvent):
    """An event whose data is sent as compact JSON. As in sse-starlette, ``None`` means no data, not ``null``.

    Args:
        data: Any JSON value. Default: ``None``, no data.
        **fields: The other arguments of `ServerSentEvent`.

    Raises:
        TypeError: `data` is not a JSON value.
        ValueError: `data` contains NaN or an infinity, which JSON does not have.
    """

    def __init__(self, data: Any = None, **fields: Any) -> None:
        if data is not None:
            data = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        super().__init__(data, **fields)


def ensure_bytes(data: Any, sep: str) -> bytes:
    """Return what a source yielded as bytes of a stream.

    Args:
        data: Bytes, sent unchanged; a `ServerSentEvent`, sent with its own line end; an `asgi_sse.ServerSentEvent`; or
            a ``dict`` of the arguments of a `ServerSentEvent`. Anything else becomes the data of an event, by
            ``str()``.
        sep: The line end, for all but bytes and a `ServerSentEvent`.

    Raises:
        TypeError: A ``dict`` has a key that is not a field of an event.
        InvalidEventError: A field of the event is invalid.
    """
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    if isinstance(data, ServerSentEvent):
        return data.encode()
    if isinstance(data, core.ServerSentEvent):
        return data.encode(sep)
    if isinstance(data, dict):
        return ServerSentEvent(**{**data, "sep": sep}).encode()
    return ServerSentEvent(str(data), sep=sep).encode()
